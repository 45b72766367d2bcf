"""What the bridge says: every answer is one object with `status`, and so is the last one of a stream."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from llambo.bridge.commands import Mistake, Tag
from llambo.mesh.wire.errors import TRAITS, Code, ErrorInfo, harmless

Said = dict[str, Any]

#: Some errors have another remedy here than at a command line.
HINTS = {
    Code.MODEL_REQUIRED: "choose one with LOAD; STATUS shows them",
    Code.UNKNOWN_MODEL: "STATUS shows those that are there",
}

_json = msgspec.json.Encoder().encode
_msgpack = msgspec.msgpack.Encoder().encode
#: DEL, C1 and what turns the direction of writing round: a terminal would obey, and `nc` shows what it gets.
_ORDERS = re.compile(b"\x7f|\xc2[\x80-\x9f]|\xe2\x80[\xaa-\xae]|\xe2\x81[\xa6-\xa9]")


def as_line(said: Said) -> bytes:
    """JSON, in which an unseen character stands as its number; it is the same text for whoever reads JSON."""
    line = _json(said)
    if not line.isascii() or b"\x7f" in line:
        line = _ORDERS.sub(lambda found: f"\\u{ord(found[0].decode()):04x}".encode(), line)
    return line + b"\n"


def as_object(said: Said) -> bytes:
    return _msgpack(said)


Encode = Callable[[Said], bytes]


def ok(message: str, data: Any) -> Said:
    return {"status": "ok", "message": message, "data": data}


def error(info: ErrorInfo) -> Said:
    hint = HINTS.get(info.code, TRAITS[info.code].hint)
    more = {"retry_after_ms": info.retry_after_ms} if info.retry_after_ms else {}
    return _error(info.text, info.code, hint, more)


def mistake(found: Mistake) -> Said:
    return _error(found.text, found.code, found.hint, {})


def token(text: str) -> Said:
    return {"type": "token", "token": text, "final": False}


def last(said: Said) -> Said:
    """It ends a stream, as an empty token with what an answer says."""
    return {"type": "token", "token": "", "final": True, **said}


def tagged(said: Said, tag: Tag) -> Said:
    return said if tag is None else {**said, "tag": tag}


def _error(text: str, code: Code, hint: str, more: dict[str, Any]) -> Said:
    # Not all text can be said in UTF-8, and what cannot was somebody's mistake.
    shown = harmless(text).encode(errors="replace").decode()
    data = {"code": code.value, "hint": hint, "retryable": TRAITS[code].retryable, **more}
    return {"status": "error", "message": shown, "data": data}
