"""The commands of the shell, the options that `set` knows, and the completion of words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import click

from llambo.cli.kit.command import load
from llambo.cli.main import PLACES
from llambo.cli.shell.lines import TO_MODEL, end_of_command


@dataclass(frozen=True, slots=True)
class ShellCommand:
    """A command of `llambo`, possibly under another name or with some arguments given."""

    #: Its module, and its name there.
    place: str
    #: For `help`, in a line; empty: another name of a command that is listed.
    about: str = ""
    arguments: tuple[str, ...] = ()


def _same(name: str, about: str = "", *arguments: str) -> ShellCommand:
    return ShellCommand(PLACES[name], about, arguments)


def _own(name: str, about: str = "") -> ShellCommand:
    return ShellCommand(f"llambo.cli.shell.own_commands:{name}_", about)


TABLE: dict[str, ShellCommand] = {
    "help": _own("help", "This list, or what one command does."),
    "status": _same("status", "The mesh in numbers."),
    "nodes": _same("workers", "The workers; also called `workers`."),
    "models": _same("models", "The models of this host and of the mesh, or one of them."),
    "queue": _same("requests", "What waits and runs; also called `requests`."),
    "infer": _same("send", "Ask, wait for the whole answer, show statistics.", "--no-stream", "-v"),
    "send": _same("send", "Ask, and show the answer as it comes; --detach: only its id."),
    "attach": _same("attach", "Follow a request that was sent earlier."),
    "cancel": _same("cancel", "Stop a request."),
    "drain": _same("drain", "Give a worker no new work."),
    "undrain": _same("drain", "Let it work again.", "--undo"),
    "why": _same("why", "The story of a request."),
    "events": _same("events", "What happened in the mesh."),
    "watch": _own("watch", "Keep on screen what a command shows: watch status."),
    "set": _own("set", "Set an option of what is sent from here on; or show them all."),
    "unset": _own("unset", "Take that back."),
    "exit": _own("exit", "Leave."),
    "workers": _same("workers"),
    "requests": _same("requests"),
    "quit": _own("exit"),
}
#: What can be repeated: these commands change nothing.
WATCHED = ("status", "nodes", "models", "queue", "why", "events", "workers", "requests")
#: Options of `send` that `set` does not have: they say where the shell is connected, or make sense only once.
NOT_SET = {"--help", "--json", "--broker", "--key", "--config", "--connect-ms", "--detach", "--logprobs"}


def command_of(name: str) -> click.Command:
    return load(TABLE[name].place)


def options_of(command: click.Command) -> list[click.Option]:
    return [option for option in command.params if isinstance(option, click.Option) and not option.hidden]


def settable() -> dict[str, click.Option]:
    """The options of `send` that `set` can set, by the names it has for them."""
    found = {}
    for option in options_of(command_of("send")):
        flag = next((text for text in option.opts if text.startswith("--")), "")
        if flag and flag not in NOT_SET:
            found["stats" if flag == "--verbose" else flag[2:].replace("-", "_")] = option
    return found


@dataclass(frozen=True, slots=True)
class MeshNames:
    """The names in the mesh that can be completed."""

    workers: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    requests: tuple[str, ...] = ()


def completions(line: str, names: MeshNames) -> list[str]:
    """The words that the last word of `line` may become. `line` ends where the cursor is."""
    while (end := end_of_command(line)) < len(line):
        line = line[end + 1 :]
    *before, begun = re.split(r"\s+", line.lstrip())
    if before and before[0] == "watch" and len(before) > 1:
        before = before[1:]
    return [word for word in _candidates(before, begun, names) if word.startswith(begun)]


def _candidates(before: list[str], begun: str, names: MeshNames) -> Iterable[str]:
    if not before:
        return () if begun.startswith(TO_MODEL) else TABLE
    command, *words = before
    if command not in TABLE:
        return ()
    if command in ("set", "unset"):
        option = settable().get(words[0]) if words else None
        if option is None or command == "unset" or len(words) > 1:
            return () if words else settable()
        return ("yes", "no") if option.is_flag else _values_of(option, names)
    if command in ("help", "watch"):
        return () if words else TABLE if command == "help" else WATCHED
    options = {text: option for option in options_of(command_of(command)) for text in option.opts if text[:2] == "--"}
    if words and words[-1] in options and not options[words[-1]].is_flag:
        return _values_of(options[words[-1]], names)
    if begun.startswith("-"):
        return options
    if any(not word.startswith("-") for word in words):
        return ()
    first_words = {
        "models": names.models,
        **dict.fromkeys(("drain", "undrain"), names.workers),
        **dict.fromkeys(("attach", "cancel", "why"), names.requests),
    }
    return first_words.get(command, ())


def _values_of(option: click.Option, names: MeshNames) -> Iterable[str]:
    if "--model" in option.opts:
        return names.models
    return option.type.choices if isinstance(option.type, click.Choice) else ()
