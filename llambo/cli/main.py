"""`llambo`: the commands for people and scripts. Each is imported when it is called."""

from __future__ import annotations

import click

from llambo.cli.kit.command import Group
from llambo.cli.kit.flags import config_option, settings_options, verbosity

#: By headings of the help: each command, its module, and what it does, in a line.
SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Ask": {
        "send": ("commands.send", "Send a prompt, and show the answer as it comes."),
        "chat": ("chat.chat", "Talk with a model; conversations are saved."),
        "shell": ("shell.shell", "Commands and prompts over one connection."),
        "attach": ("commands.send", "Follow a request that was sent earlier."),
        "cancel": ("commands.requests", "Stop a request."),
        "embed": ("commands.tokens", "Turn texts into vectors."),
        "rerank": ("commands.rerank", "Sort documents by how well they fit a query."),
        "tokens": ("commands.tokens", "Show the tokens of a text."),
    },
    "Look": {
        "status": ("commands.status", "The mesh in numbers."),
        "workers": ("commands.workers", "The workers, their state and speed."),
        "models": ("commands.models", "The models of this machine and of the mesh."),
        "pull": ("commands.downloads", "Download a model."),
        "rm": ("commands.downloads", "Remove a model that was downloaded."),
        "requests": ("commands.requests", "What waits and what runs."),
        "why": ("commands.requests", "What happened to one request, and when."),
        "events": ("commands.status", "What happened in the mesh."),
        "top": ("top.top", "All of it on a live screen."),
        "metrics": ("commands.status", "Figures for Prometheus."),
    },
    "Run": {
        "up": ("services.up", "A whole mesh on this machine, until Ctrl-C."),
        "broker": ("services.broker", "A broker: the address that all connect to."),
        "worker": ("services.worker", "A worker: runs a model, and joins a broker."),
        "gateway": ("services.gateway", "HTTP: OpenAI's and Anthropic's APIs, dashboard."),
        "bridge": ("services.bridge", "Lines of text on a socket, for small programs."),
        "fleet": ("fleet.fleet", "Many workers by a file: started, updated, scaled."),
        "systemd": ("services.systemd", "Broker and workers as services of this machine."),
    },
    "Administer": {
        "doctor": ("doctor.doctor", "What is wrong here, and the command that helps."),
        "load": ("commands.loading", "Load a model at a host, and keep it loaded."),
        "unload": ("commands.loading", "Give a model back, and free its memory."),
        "drain": ("commands.workers", "Give a worker no new work, or work again."),
        "keys": ("commands.keys", "Who may connect: keys, API tokens, limits."),
        "config": ("commands.config", "The settings in force, and where they come from."),
        "completion": ("commands.completion", "Completion with Tab in your shell."),
        "help": ("commands.help", "The documents."),
    },
}
#: The name of a command in its module, where it is not that of the command.
_NAMES = {"help": "help_", "broker": "main", "worker": "main"}
#: Where each command is, for `load`.
PLACES = {
    name: f"llambo.cli.{module}:{_NAMES.get(name, name)}"
    for commands in SECTIONS.values()
    for name, (module, _) in commands.items()
}
#: What users of other programs may type, and what there is here.
POINTERS = {
    "serve": "`llambo up` serves a model on this machine",
    "start": "`llambo up` serves a model on this machine",
    "run": "`llambo chat --model NAME` talks with a model, `llambo up --model FILE.gguf` serves one",
    "download": "`llambo pull hf:ORG/REPO` downloads a model",
    "remove": "`llambo rm NAME` removes a model that was downloaded",
    "list": "`llambo models` lists the models",
    "ls": "`llambo models` lists the models",
    "show": "`llambo models NAME` tells what a model is",
    "ps": "`llambo workers` lists what serves, `llambo requests` what runs",
    "nodes": "`llambo workers` lists them",
    "queue": "`llambo requests` lists what waits and runs",
    "uninstall": "`llambo help operations` says how, under Uninstall",
    "stop": "`llambo drain NAME` empties a worker, `llambo cancel ID` stops a request",
}

EXAMPLES = """
llambo up --engine fake --workers 3      a mesh on this machine
llambo send "What is AI?"                ask it
llambo --broker tcp://box:7330 status    look at another one
llambo why 3f2a                          what became of a request, and why
"""


def _version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        import llambo

        click.echo(f"llambo {llambo.__version__}")
        context.exit()


@click.group(
    cls=Group,
    lazy=PLACES,
    sections={heading: {name: about for name, (_, about) in rows.items()} for heading, rows in SECTIONS.items()},
    pointers=POINTERS,
    exit_codes=True,
    examples=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@settings_options(["broker", "key"])
@config_option()
@verbosity("Log to stderr; twice for more.")
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version."
)  # fmt: skip
def main() -> None:
    """llambo: one endpoint for many machines that run llama.cpp.

    Every option that has a default can be set in the environment and in llambo.toml as well; `llambo config`
    shows what is in force.
    """
