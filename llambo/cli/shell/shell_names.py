"""The commands of the shell, and what Tab makes of the beginning of a word. No mesh here: names come as values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import click

from llambo.cli.kit.command import load
from llambo.cli.shell.shell_lines import TO_MODEL, end_of_order


@dataclass(frozen=True, slots=True)
class Entry:
    """A command of the shell is one of `llambo`, maybe under another name or with something said already."""

    #: Where the command is: module and name in it.
    at: str
    said: tuple[str, ...] = ()
    #: For the list of commands, in a line.
    about: str = ""


def _same(name: str, about: str) -> Entry:
    return Entry(f"llambo.cli.commands.{name}:{name}", about=about)


def _own(name: str, about: str) -> Entry:
    return Entry(f"llambo.cli.shell.shell_own:{name}_", about=about)


ENTRIES: dict[str, Entry] = {
    "help": _own("help", "This list, or what one command does."),
    "status": _same("status", "The mesh in numbers."),
    "nodes": _same("workers", "The workers; also called `workers`."),
    "models": _same("models", "The models of this host and of the mesh, or one of them."),
    "queue": _same("requests", "What waits and runs; also called `requests`."),
    "infer": Entry(
        "llambo.cli.commands.send:send", ("--no-stream", "-v"), "Ask, wait for the whole answer, show statistics."
    ),
    "send": _same("send", "Ask, and show the answer as it comes; --detach: only its id."),
    "attach": _same("attach", "Follow a request that was sent earlier."),
    "cancel": _same("cancel", "Stop a request."),
    "drain": _same("drain", "Give a worker no new work."),
    "undrain": Entry("llambo.cli.commands.drain:drain", ("--undo",), "Let it work again."),
    "why": _same("why", "The story of a request."),
    "events": _same("events", "What happened in the mesh."),
    "watch": _own("watch", "Keep on screen what a command shows: watch status."),
    "set": _own("set", "Set an option of what is sent from here on; or show them all."),
    "unset": _own("unset", "Take that back."),
    "exit": _own("exit", "Leave."),
    "workers": _same("workers", ""),
    "requests": _same("requests", ""),
    "quit": _own("exit", ""),
}
#: Other names of commands that are there already; `help` leaves them out.
ALIASES = ("workers", "requests", "quit")
#: What only looks, and so can be looked at again and again.
WATCHED = ("status", "nodes", "models", "queue", "why", "events", "workers", "requests")
#: What the first word after a command names.
NAMES_WORKER = ("drain", "undrain")
NAMES_REQUEST = ("attach", "cancel", "why")


def command_of(name: str) -> click.Command:
    return load(ENTRIES[name].at)


@dataclass(frozen=True, slots=True)
class Known:
    """The names in the mesh that can be completed, and the options that `set` knows."""

    workers: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    requests: tuple[str, ...] = ()
    settable: dict[str, click.Option] = field(default_factory=dict)


def completions(line: str, known: Known) -> list[str]:
    """The words that the last word of `line` may become. `line` ends where the cursor is."""
    order = line
    while (end := end_of_order(order)) < len(order):
        order = order[end + 1 :]
    words = re.split(r"\s+", order.lstrip())
    *before, begun = words
    if before and before[0] == "watch" and len(before) > 1:
        before = before[1:]
    return [word for word in _candidates(before, begun, known) if word.startswith(begun)]


def _candidates(before: list[str], begun: str, known: Known) -> Iterable[str]:
    if not before:
        return () if begun.startswith(TO_MODEL) else ENTRIES
    name, *told = before
    if name not in ENTRIES:
        return ()
    if name in ("set", "unset"):
        return _settings(name, told, known)
    if name in ("help", "watch"):
        return () if told else ENTRIES if name == "help" else WATCHED
    options = {text: option for option in options_of(command_of(name)) for text in option.opts if text[:2] == "--"}
    if told and told[-1] in options and not options[told[-1]].is_flag:
        return values_of(options[told[-1]], known)
    if begun.startswith("-"):
        return options
    if any(not word.startswith("-") for word in told):
        return ()
    return {
        **dict.fromkeys(NAMES_WORKER, known.workers),
        **dict.fromkeys(NAMES_REQUEST, known.requests),
        "models": known.models,
    }.get(name, ())


def _settings(name: str, told: list[str], known: Known) -> Iterable[str]:
    if not told:
        return known.settable
    option = known.settable.get(told[0])
    if name == "unset" or option is None or len(told) > 1:
        return ()
    return ("yes", "no") if option.is_flag else values_of(option, known)


def options_of(command: click.Command) -> list[click.Option]:
    return [option for option in command.params if isinstance(option, click.Option) and not option.hidden]


def values_of(option: click.Option, known: Known) -> Iterable[str]:
    if "--model" in option.opts:
        return known.models
    return option.type.choices if isinstance(option.type, click.Choice) else ()
