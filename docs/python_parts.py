"""The generated parts of docs/python.md: the public classes of `llambo`, by their docstrings and comments."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import msgspec

import llambo
from docs import protocol_parts
from llambo.mesh.client.request_options import CLIENT_DEFAULTS, SAMPLING_OPTIONS
from llambo.mesh.wire.errors import TRAITS, Code
from llambo.mesh.wire.messages import Sampling

#: For llambo itself: between an error and its message on the wire.
NOT_SHOWN = {"LlamboError": {"info", "of", "trait"}}
#: When these errors come, for a program; of the others the protocol reference says it.
WHEN = {
    Code.BAD_MESSAGE: "a broker or a worker has sent what cannot be read",
    Code.BAD_VERSION: "the broker speaks another version of the protocol",
    Code.UNKNOWN_TYPE: "the address is not that of a broker's port for clients, or the broker is older",
    Code.UNKNOWN_SESSION: "never raised: the client connects again by itself",
    Code.NAME_TAKEN: "never raised in a client: two workers have one name",
    Code.BAD_REQUEST: "a prompt, a conversation or an option is not valid, or the beginning of an id is not unique",
    Code.BUSY: "the queue is full, or there is no memory for another answer, or there are too many clients",
    Code.ENGINE_FAILED: "the engines of several workers died while they ran it, or no host could load the model",
    Code.NO_BROKER: "no broker answers within `connect_ms`, or again within `lost_ms`; or the client is not connected",
    Code.TIMEOUT: "a query has no answer within `query_ms`",
    Code.CANCELLED: "a task was cancelled; an answer that was cancelled ends with that reason instead",
    Code.BAD_SETTING: "an address, a key or a setting of the client cannot be used",
    Code.DEADLINE: "the `deadline_ms` of a task has passed; an answer ends with that reason instead",
    Code.INTERNAL: "a bug, or an answer that is too long to send",
}
#: A longer signature has its parameters in a line of their own.
WIDTH = 110
#: Types that the standard library spells in a longer way.
_SHORT = {type(None): "None", Any: "Any", ...: "..."}


# --- types -------------------------------------------------------------------------------------------


def shown(kind: Any) -> str:
    """A type as a program writes it, the same in every version of Python."""
    if isinstance(kind, list):
        return f"[{', '.join(map(shown, kind))}]"
    if kind in _SHORT:
        return _SHORT[kind]
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " | ".join(map(shown, args))
    if origin is Literal:
        return " | ".join(map(_default, args))
    name = _name_of(origin or kind)
    if name == "Unpack":
        return shown(args[0])
    return f"{name}[{', '.join(map(shown, args))}]" if args and name != "Context" else name


def _name_of(kind: Any) -> str:
    if kind == llambo.Messages:
        return "Messages"
    return str(getattr(kind, "__name__", kind)).rpartition(".")[2]


def signature(name: str, function: Callable[..., Any]) -> str:
    """Without `self`, and without what follows from it: `Options` are keywords."""
    hints = get_type_hints(function)
    parameters = []
    for parameter in [*inspect.signature(function).parameters.values()][1:]:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        stars = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f" = {_default(parameter.default)}"
        parameters.append(f"{stars}{parameter.name}: {_or_messages(hints[parameter.name])}{default}")
    wait = "await " if inspect.iscoroutinefunction(function) else ""
    returned = shown(hints["return"]) if hints.get("return") not in (None, type(None)) else ""
    call = f"{wait}{name}({', '.join(parameters)})"
    if len(call) > WIDTH:
        call = f"{wait}{name}(\n    {', '.join(parameters)},\n)"
    return f"{call} -> {returned}" if returned else call


def _or_messages(kind: Any) -> str:
    """`Messages` is an alias: only its content is left of it in a union."""
    return shown(kind).replace(shown_messages(), "Messages")


@cache
def shown_messages() -> str:
    origin = get_origin(llambo.Messages)
    return f"{origin.__name__}[{', '.join(shown(each) for each in get_args(llambo.Messages))}]"


def _default(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


# --- what a class has --------------------------------------------------------------------------------


def comments(kind: type) -> dict[str, str]:
    """The `#:` comments above the fields of a class and above the attributes that its `__init__` sets."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if each.__module__.startswith("llambo."):
            found |= _comments_of(each)
    if is_typeddict(kind):  # at run time it is a plain dict
        found = _comments_of(kind)
    return found


def _comments_of(kind: type) -> dict[str, str]:
    lines = textwrap.dedent(inspect.getsource(kind)).splitlines()
    found, comment = {}, ""
    for line in map(str.strip, lines):
        if line.startswith("#:"):
            comment = f"{comment} {line.removeprefix('#:').strip()}".strip()
            continue
        if comment and (field := re.match(r"(?:self\.)?(\w+)(?::| =)", line)):
            found[field[1]] = comment
        comment = ""
    return found


def fields(kind: type) -> dict[str, str]:
    """Name and type of each field."""
    hints = get_type_hints(kind)
    names = kind.__struct_fields__ if issubclass(kind, msgspec.Struct) else hints
    return {name: _or_messages(hints[name]) for name in names if not name.startswith("_")}


def attributes(kind: type) -> dict[str, tuple[str, str]]:
    """Type and meaning of what `__init__` sets with a comment, and of properties."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    said, found = comments(kind), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute) and node.target.attr in said:
            found[node.target.attr] = ast.unparse(node.annotation), said[node.target.attr]
    for name, member in vars(kind).items():
        if isinstance(member, property) and _is_shown(kind, name):
            hints = get_type_hints(member.fget)
            found[name] = shown(hints["return"]), inspect.getdoc(member) or ""
    return found


def methods(kind: type) -> dict[str, Callable[..., Any]]:
    return {name: value for name, value in vars(kind).items() if inspect.isfunction(value) and _is_shown(kind, name)}


def _is_shown(kind: type, name: str) -> bool:
    return not name.startswith("_") and name not in NOT_SHOWN.get(kind.__name__, ())


# --- as text -----------------------------------------------------------------------------------------


def table(head: list[str], rows: list[tuple[str, ...]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in cells]


def text_of(member: Any) -> str:
    """Its own docstring, not that of a class it is derived from."""
    return inspect.cleandoc(vars(member).get("__doc__") or "" if isinstance(member, type) else member.__doc__ or "")


def record(kind: type, level: str = "###") -> str:
    """A class that is only data, or a dictionary of options."""
    said = comments(kind)
    rows = [(f"`{name}`", f"`{type_}`", said.get(name, "")) for name, type_ in fields(kind).items()]
    rows += [(f"`{name}`", f"`{type_}`", doc) for name, (type_, doc) in attributes(kind).items()]
    return "\n".join([f"{level} {kind.__name__}\n", text_of(kind), "", *table(["field", "type", ""], rows)])


def options(kind: type, defaults: dict[str, Any] | None = None) -> str:
    """A dictionary of keywords. None is not shown: it means left out."""
    said = comments(kind)
    rows = []
    for name, type_ in fields(kind).items():
        row = f"`{name}`", f"`{type_.removesuffix(' | None')}`", said.get(name, "")
        rows.append((*row[:2], f"`{_default(defaults[name])}`", row[2]) if defaults else row)
    head = ["keyword", "type", *(["default"] if defaults else []), ""]
    return "\n".join([f"### {kind.__name__}\n", text_of(kind), "", *table(head, rows)])


def sections(kind: type) -> Iterator[tuple[str, list[str]]]:
    """The parts into which comments divide a class, each with its methods."""
    title, names = "", []
    for line in inspect.getsource(kind).splitlines():
        if found := re.match(r"    # --- ([\w, ]+?) -+$", line):
            yield title, names
            title, names = found[1], []
        elif found := re.match(r"    (?:async )?def (\w+)", line):
            names.append(found[1])
    yield title, names


def python_client() -> str:
    lines = [
        f"### Client\n\n{text_of(llambo.Client)}\n",
        f"```python\n{signature('Client', llambo.Client.__init__)}\n```\n",
        text_of(llambo.Client.__init__) + "\n",
        *_attributes("client", llambo.Client),
    ]
    known = methods(llambo.Client)
    for title, names in sections(llambo.Client):
        shown_here = [name for name in names if name in known]
        if shown_here:
            lines.append(f"\n#### Client: {title}")
        for name in shown_here:
            lines.append(_method("client", name, known[name]))
    return "\n".join(lines)


def python_stream() -> str:
    known = methods(llambo.Stream)
    parts = [_method("stream", name, function) for name, function in known.items()]
    return "\n".join([f"### Stream\n\n{text_of(llambo.Stream)}\n", *_attributes("stream", llambo.Stream), *parts])


def _attributes(name: str, kind: type) -> list[str]:
    rows = [(f"`{name}.{each}`", f"`{type_}`", doc) for each, (type_, doc) in attributes(kind).items()]
    return table(["attribute", "type", ""], rows)


def _method(owner: str, name: str, function: Callable[..., Any]) -> str:
    return f"\n```python\n{signature(f'{owner}.{name}', function)}\n```\n\n{text_of(function)}"


def python_sync() -> str:
    """What the client without asyncio has."""
    rows = []
    for kind, base in ((llambo.SyncClient, llambo.Client), (llambo.SyncStream, llambo.Stream)):
        names = [name for name in vars(kind) if not name.startswith("_")]
        same = [name for name in names if hasattr(base, name) or name in attributes(base)]
        own = [name for name in names if name not in same]
        members = [f"`{name}`: {_first_line(kind, name)}" for name in own]
        rows.append((f"`{kind.__name__}`", ", ".join(f"`{name}`" for name in same), "; ".join(members)))
    lines = [f"### {kind.__name__}\n\n{text_of(kind)}\n" for kind in (llambo.SyncClient, llambo.SyncStream)]
    return "\n".join([*lines, *table(["", "the same, without `await`", "besides"], rows)])


def _first_line(kind: type, name: str) -> str:
    return text_of(vars(kind)[name]).partition("\n")[0].rstrip(".")


def python_options() -> str:
    kinds = [options(llambo.Options), options(llambo.TaskCall)]
    return "\n\n".join([options(llambo.ClientSettings, dict(CLIENT_DEFAULTS)), *kinds])


def python_sampling() -> str:
    """What the option `sampling` may have besides the options that have a name of their own."""
    said, hints = comments(Sampling), get_type_hints(Sampling)
    rows = []
    for field in msgspec.structs.fields(Sampling):
        if field.name not in SAMPLING_OPTIONS:
            default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
            rows.append(
                (f"`{field.name}`", f"`{shown(hints[field.name])}`", f"`{_default(default)}`", said[field.name])
            )
    return "\n".join(table(["field", "type", "default", ""], rows))


ANSWERS = ("Piece", "Answer", "Usage", "CalledTool", "Logprob", "TopToken", "Tokenized", "Embeddings",
           "Ranking", "RankedDocument")  # fmt: skip
ROWS = (
    "MeshStatus", "ModelRow", "ModelHost", "ModelVariant", "HostRow", "MemoryRow", "WorkerRow", "RequestRow",
    "RequestStory", "StoryStep", "EventRow", "Recent", "SampleRow", "EndedRow", "AccountRow", "DrainReply", "HoldReply",
    "PullReply", "PullHost", "Lease", "LeaseReply", "Counters",
)  # fmt: skip


def python_answers() -> str:
    return "\n\n".join(record(getattr(llambo, name)) for name in ANSWERS)


def python_rows() -> str:
    return "\n\n".join(record(getattr(llambo, name)) for name in ROWS)


def python_errors() -> str:
    rows = []
    for code, trait in TRAITS.items():
        when = WHEN.get(code) or protocol_parts.WHEN[code.value]
        rows.append((f"`Code.{code.name}`", when, "yes" if trait.retryable else "no", trait.hint))
    error = llambo.LlamboError
    return "\n".join([
        f"### LlamboError\n\n{text_of(error)}\n",
        *_attributes("error", error),
        f"\n### Code\n\n{text_of(Code)}\n",
        *table(["code", "when", "try again?", "hint"], rows),
    ])  # fmt: skip


GENERATORS: dict[str, Callable[[], str]] = {
    "python-client": python_client,
    "python-stream": python_stream,
    "python-sync": python_sync,
    "python-options": python_options,
    "python-answers": python_answers,
    "python-rows": python_rows,
    "python-sampling": python_sampling,
    "python-errors": python_errors,
}
