"""The generated parts of docs/protocol.md: limits, errors, every message with its fields, and a conversation in hex."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgpack
import msgspec

from llambo.mesh.wire import codec, limits, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import TRAITS, ErrorInfo

DIRECTIONS = {
    "client to broker": get_args(m.ClientToBroker),
    "broker to client": get_args(m.BrokerToClient),
    "worker to broker": get_args(m.WorkerToBroker),
    "broker to worker": get_args(m.BrokerToWorker),
    "host to broker": get_args(m.HostToBroker),
    "broker to host": get_args(m.BrokerToHost),
}
#: Structs that stand inside messages, or inside a part of one that the broker does not read.
PARTS: dict[str, type[msgspec.Struct]] = {
    "error_info": ErrorInfo,
    "usage": m.Usage,
    "model_info": m.ModelInfo,
    "hosted_model": m.HostedModel,
    "hosted_file": m.HostedFile,
    "file_order": m.FileOrder,
    "file_source": m.FileSource,
    "file_grant": m.FileGrant,
    "memory": m.Memory,
    "sampling": m.Sampling,
}


#: When each error comes.
WHEN = {
    "bad_message": "a frame or field is not as described here",
    "bad_version": "the framing version, or none of the versions in the hello, is spoken by the broker",
    "unknown_type": "a message type that this end does not know, or that this role may not send",
    "unknown_session": "the header names no live session",
    "name_taken": "another live worker, or host, has this name",
    "unauthorized": "the key is not known, not valid any more, or not one for this port",
    "forbidden": "the key does not allow that: another worker's name, an admin's query, a model, a priority",
    "over_limit": "the key's limits: too many requests at a time, waiting, or in a minute; too many bytes",
    "bad_request": "an empty prompt, bad sampling options, an unknown query, an ambiguous id",
    "too_long": "a prompt over the limit, more tokens than the broker can ever hold, or more than the model's context",
    "unknown_model": "no worker that was ever here serves it, and no host has it",
    "model_required": "several models are served and the request names none",
    "unknown_request": "no request with that id is known here",
    "unknown_worker": "no worker, or host, has that name",
    "expired": "the request has ended and its tokens are gone",
    "busy": "the queue is full, the memory for transcripts is reserved, too many clients or workers; from a worker: no "
    "slot now; in an `end`: workers refuse or fail faster than they answer",
    "no_worker": "no worker has ever joined, or none has served the model for `hold_ms`",
    "deadline": "the request's own deadline has passed",
    "queue_timeout": "it waited for `queue_ms`",
    "engine_failed": "engines died while they ran it, a worker sent impossible data, or no host could load the model",
    "no_broker": "made by the client library and the commands; never sent",
    "timeout": "made by the client library and the commands; never sent",
    "cancelled": "made by the client library and the commands; never sent",
    "bad_setting": "made by the client library and the commands; never sent",
    "internal": "an answer that is too long to send; otherwise a bug",
}


def error_table() -> str:
    """Every error code, and what is always true of it."""
    lines = ["| code | at fault | HTTP | try again? | when |", "| --- | --- | --- | --- | --- |"]
    for code, trait in TRAITS.items():
        again = "yes" if trait.retryable else "no"
        lines.append(f"| `{code.value}` | {trait.fault.value} | {trait.http} | {again} | {WHEN[code.value]} |")
    return "\n".join(lines)


def limit_table() -> str:
    """The constants of mesh/wire/limits.py with the `#:` comments above them; one comment may speak for several."""
    lines = ["| limit | value | of what |", "| --- | --- | --- |"]
    comment: list[str] = []
    in_comment = False
    for line in Path(limits.__file__).read_text(encoding="utf-8").splitlines():
        if line.startswith("#:"):
            comment = [*(comment if in_comment else []), line.removeprefix("#:").strip()]
        in_comment = line.startswith("#:")
        if found := re.match(r"([A-Z_]+) = ", line):
            value = getattr(limits, found[1])
            lines.append(f"| `{found[1]}` | {value:,} | {' '.join(comment)} |")
    return "\n".join(lines)


# --- messages ----------------------------------------------------------------------------------------


def tag_of(message: type[m.Message]) -> str:
    """Its name on the wire."""
    return str(message.__struct_config__.tag)


def message_index() -> str:
    """Every message, by who sends it to whom."""
    lines = ["| direction | messages |", "| --- | --- |"]
    for direction, union in DIRECTIONS.items():
        lines.append(f"| {direction} | {', '.join(f'`{tag_of(message)}`' for message in union)} |")
    return "\n".join(lines)


def field_table(struct: type[msgspec.Struct]) -> str:
    """The fields of a message or of a part of one: type, limits, default. One without a default is required."""
    info = msgspec.inspect.type_info(struct)
    assert isinstance(info, msgspec.inspect.StructType)
    rows = [(field.encode_name, shape(field.type), _default(field)) for field in info.fields]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [
        f"{name:{widths[0]}}  {kind:{widths[1]}}{default and f'  = {default}'}".rstrip() for name, kind, default in rows
    ]
    return "\n".join(["```text", *lines, "```"])


def shape(kind: msgspec.inspect.Type) -> str:
    """A type in words."""
    i = msgspec.inspect
    match kind:
        case i.BytesType(low, high):
            return f"{high} bytes" if low == high and high else "bytes" + _up_to(high, "")
        case i.StrType(low, high):
            return "text" + (f", {low} to {high:,} characters" if low else _up_to(high, " characters"))
        case i.IntType():
            return f"integer, {_number(kind.ge)} to {_number(kind.le)}" if kind.ge is not None else "integer"
        case i.FloatType():
            return f"float, {kind.ge:g} to {kind.le:g}" if kind.ge is not None else "float"
        case i.BoolType():
            return "bool"
        case i.NoneType():
            return "nil"
        case i.RawType():
            return "any msgpack value"
        case i.LiteralType(values):
            return "one of " + ", ".join(f"{value}" for value in values)
        case i.EnumType():
            return "an error code"
        case i.StructType(cls):
            return f"map, see {re.sub(r'(?<!^)(?=[A-Z])', '_', cls.__name__).lower()}"
        case i.ListType():
            return f"array of {shape(kind.item_type)}" + _up_to(kind.max_length, " entries")
        case i.TupleType(items):
            return f"array of {len(items)}: {', '.join(shape(item) for item in items)}"
        case i.DictType():
            return f"map from {shape(kind.key_type)} to {shape(kind.value_type)}"
        case i.UnionType(types):
            return " or ".join(shape(one) for one in types)
    raise NotImplementedError(f"how is {kind} called?")


def _up_to(high: int | None, unit: str) -> str:
    return "" if high is None else f", at most {high:,}{unit}"


def _number(value: Any) -> str:
    for power in (31, 53, 63):
        if value in (2**power, 2**power - 1):
            return f"2^{power}" + (" - 1" if value % 2 else "")
    return f"{value:,}"


def _default(field: msgspec.inspect.Field) -> str:
    if field.required:
        return ""
    if field.default_factory is not msgspec.NODEFAULT:
        return "empty"
    match field.default:
        case msgspec.Raw():
            return "an empty map"
        case msgspec.Struct():
            return "all its defaults"
        case None:
            return "nil"
        case bool(value):
            return str(value).lower()
        case int(value) | float(value):
            return f"{value:,}"
        case tuple(value):
            return str(list(value))
        case value:
            return str(value) if value else "empty"


# --- a worked example --------------------------------------------------------------------------------

_ID, _SESSION, _TOPIC = bytes(range(16)), b"session!", bytes(range(0xA0, 0xB0))
_DISPATCH = bytes.fromhex("000000015e9a7c11")

#: A short conversation: who speaks, and the frames.
EXAMPLE: list[tuple[str, list[bytes]]] = [
    ("1. client, on control", codec.encode(codec.NO_SESSION, [(m.ClientHello(), None)])),
    ("2. broker", codec.encode(codec.NO_SESSION, [(m.Welcome(_SESSION, 7333, _TOPIC, broker="broker"), None)])),
    ("3. broker, on the token plane", [_TOPIC + tokens.encode_beat(1, _SESSION)]),
    (
        "4. client, on control: two messages in one bundle",
        codec.encode(_SESSION, [(m.ClientHeartbeat(1), None), (m.InferenceRequest(_ID, max_tokens=2), b"What is AI?")]),
    ),
    ("5. broker", codec.encode(_SESSION, [(m.Accepted(_ID, model="fake"), None)])),
    (
        "6. broker, on the token plane: the last of two tokens, final because `max_tokens` is reached",
        [_TOPIC + tokens.encode_chunk(_ID + _DISPATCH, 1, [1234], [b" mesh"], tokens.FINAL)],
    ),
    ("7. broker, on control", codec.encode(_SESSION, [(m.End(_ID, 2, "length", worker="w-1"), None)])),
    ("8. client: the first token is missing", codec.encode(_SESSION, [(m.Replay(_ID, 0, 1), None)])),
    (
        "9. broker",
        codec.encode(_SESSION, [(m.Page(_ID, 0, 1, 2, [tokens.encode_chunk(_ID + _DISPATCH, 0, [77], [b"A"])]), None)]),
    ),
    ("10. client", codec.encode(_SESSION, [(m.EndAck([_ID]), None)])),
]


def example() -> str:
    """The conversation above: each frame in hex, and below it what it says."""
    lines = ["```text"]
    for title, frames in EXAMPLE:
        lines.append(title)
        for frame in frames:
            first, *rest = [frame[at : at + 32].hex(" ", -4) for at in range(0, len(frame), 32)]
            lines += [f"    - {first}", *(f"      {part}" for part in rest)]
            lines += [f"        {part}" for part in _explained(frame)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n```"


def _explained(frame: bytes) -> list[str]:
    if frame[:3] == b"llb":
        return [f'header: "llb", framing version {frame[3]}, session {frame[4:].hex()}']
    if frame[:16] == _TOPIC:
        return ["topic, then " + _explained_tokens(frame[16:])]
    if frame[:1] < b"\x90":
        return [f"extra frame: {frame.decode()}"]
    return textwrap.wrap(json.dumps(_plain(msgpack.unpackb(frame, strict_map_key=False))), 108)


def _explained_tokens(frame: bytes) -> str:
    if beat := tokens.decode_beat(frame):
        return f'"B", number {beat[0]}, session {beat[1].hex()}'
    chunk = tokens.decode_chunk(frame)
    assert chunk is not None
    head = f"first index {chunk.first}, count {len(chunk.body.ids)}, flags {chunk.flags}"
    return f'"T", request id, dispatch id, {head}, [{chunk.body.ids}, {chunk.body.pieces}]'


def _plain(value: Any) -> Any:
    """What an independent msgpack reader sees, as JSON can show it."""
    match value:
        case bytes():
            return f"0x{value.hex()}"
        case dict():
            return {_plain(key): _plain(item) for key, item in value.items()}
        case list():
            return [_plain(item) for item in value]
    return value


def _fields(of: type[msgspec.Struct]) -> Callable[[], str]:
    return lambda: field_table(of)


GENERATORS: dict[str, Callable[[], str]] = {
    "errors": error_table,
    "example": example,
    "limits": limit_table,
    "messages": message_index,
    **{f"message-{tag_of(message)}": _fields(message) for message in m.Message.__subclasses__()},
    **{f"part-{name}": _fields(part) for name, part in PARTS.items()},
}
