"""The language of the shell: what a line typed at `llambo>` means, which commands there are, and how words complete.

status; nodes                   two commands
send "one; two" --seed 7        quotes as in a shell
What is AI?; really?            its first word is no command: the whole line is a prompt, as it was typed
status; What is AI?             a command, and a prompt up to the end of the line
> why is the sky blue?          a prompt, although `why` is a command
# nothing                       a remark
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import click

from llambo.cli.kit.command import SIMILAR, load
from llambo.cli.main import PLACES

# --- lines ---------------------------------------------------------------------------------------------

#: Begins a prompt to the model, whatever its first word is.
TO_MODEL = ">"
REMARK = "#"

_FIRST_WORD = re.compile(r"[^\s;]+")


@dataclass(frozen=True, slots=True)
class CommandCall:
    name: str
    words: tuple[str, ...] = ()
    #: What was typed after the name, unchanged.
    rest: str = ""


@dataclass(frozen=True, slots=True)
class ModelPrompt:
    text: str


class BadLine(ValueError):
    """Nothing of the line is carried out; the text says why."""


def parse(line: str, commands: Collection[str]) -> list[CommandCall | ModelPrompt]:
    """The whole line, before anything of it is carried out: half a line would be worse than none."""
    found: list[CommandCall | ModelPrompt] = []
    rest = line.strip()
    while rest and not rest.startswith(REMARK):
        if rest.startswith(";"):
            rest = rest[1:].lstrip()
            continue
        if rest.startswith(TO_MODEL):
            return [*found, ModelPrompt(rest[len(TO_MODEL) :].strip())]
        rest = _without_llambo(rest, commands)
        first = _FIRST_WORD.match(rest)
        assert first is not None, "it begins neither with a space nor with a semicolon"
        if first[0] not in commands:
            _refuse_typing_mistake(rest, commands)
            return [*found, ModelPrompt(rest)]
        end = end_of_command(rest)
        found.append(_call(rest[:end]))
        rest = rest[end:].lstrip()
    return found


def _without_llambo(rest: str, commands: Collection[str]) -> str:
    """`llambo status` is typed out of habit, and means `status`. (`llambo is nice` is a prompt.)"""
    name, _, after = rest.partition(" ")
    second = _FIRST_WORD.match(after.lstrip()) if name == "llambo" else None
    if second is None:
        return rest
    if second[0] in PLACES and second[0] not in commands:
        raise BadLine(
            f"`llambo {second[0]}` is not a command of the shell; leave it with `exit`, or use another terminal"
        )
    return after.lstrip() if second[0] in commands else rest


def end_of_command(text: str) -> int:
    """Where the first semicolon outside quotes is; or the end."""
    quote, at = "", 0
    while at < len(text):
        letter = text[at]
        if letter == "\\" and quote != "'":
            at += 1
        elif quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == ";":
            return at
        at += 1
    return len(text)


def _call(text: str) -> CommandCall:
    try:
        name, *words = shlex.split(text)
    except ValueError as error:
        hint = "" if text.rstrip().endswith("\\") else f"; begin a prompt to the model with `{TO_MODEL}`"
        raise BadLine(f"{text.strip()!r}: {str(error).lower()}{hint}") from error
    return CommandCall(name, tuple(words), text[len(name) :].strip())


def _refuse_typing_mistake(rest: str, commands: Collection[str]) -> None:
    """A single word that is almost a command is hardly meant for the model."""
    close = difflib.get_close_matches(rest.lower(), commands, 1, SIMILAR) if " " not in rest else []
    if close:
        raise BadLine(f"{rest!r} is no command; {close[0]!r} is, and `{TO_MODEL} {rest}` asks the model")


# --- commands, and the options that `set` sets -----------------------------------------------------------


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
    "status": _same("status", "The mesh in numbers; also called `cluster`."),
    "nodes": _same("workers", "The workers; also called `workers`."),
    "models": _same("models", "The models of this host and of the mesh, or one of them."),
    "queue": _same("requests", "What waits and runs; also called `requests`."),
    "infer": _same("send", "Ask, wait for the whole answer, show statistics.", "--no-stream", "-v"),
    "send": _same("send", "Ask, and show the answer as it comes; --detach: only its id."),
    "attach": _same("attach", "Follow a request that was sent earlier."),
    "cancel": _same("cancel", "Stop a request."),
    "drain": _same("drain", "Give a worker no new work."),
    "undrain": _same("drain", "Let it work again.", "--undo"),
    "spawn": ShellCommand("llambo.cli.fleet.fleet:spawn", "Start a worker of a class of fleet.toml: spawn tiny."),
    "why": _same("why", "The story of a request."),
    "events": _same("events", "What happened in the mesh."),
    "watch": _own("watch", "Keep on screen what a command shows: watch status."),
    "set": _own("set", "Set an option of what is sent from here on; or show them all."),
    "unset": _own("unset", "Take that back."),
    "exit": _own("exit", "Leave."),
    "cluster": _same("status"),
    "workers": _same("workers"),
    "requests": _same("requests"),
    "quit": _own("exit"),
}
#: What can be repeated: these commands change nothing.
WATCHED = ("status", "cluster", "nodes", "models", "queue", "why", "events", "workers", "requests")
#: Options of `send` that `set` does not have: they choose where the shell is connected, or make sense only once.
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


# --- completion ----------------------------------------------------------------------------------------


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
