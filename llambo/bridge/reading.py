"""From bytes to commands: by lines, or as msgpack objects that follow each other without lengths.

Nothing here is trusted: a line has a limit, an object has limits on its bytes, its parts and its depth.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Any, Protocol

import msgpack
import msgspec

from llambo.bridge.commands import COMMANDS, Command, Mistake, command_of

#: An unpacker is given so much at a time, because it holds what it has not looked at yet.
SLICE_BYTES = 64 * 1024
#: Parts of one list, and pairs of one map: room for them is made before they are there.
LIST_PARTS, MAP_PAIRS = 4_096, 2_048

_WORDS = re.compile(r"[ \t]*([^ \t]+)(?:[ \t](.*))?", re.DOTALL)
#: What a browser would say, to which any page can give words. Commands could be hidden in what follows.
_HTTP = re.compile(r"[A-Z]+ \S+ HTTP/[0-9.]+", re.IGNORECASE)

Found = Command | Mistake


class Reader(Protocol):
    def feed(self, data: bytes) -> None: ...

    def next(self) -> Found | None:
        """None: there is no whole one."""

    def end(self) -> Found | None:
        """Nothing more comes: what the last one is worth."""

    def rest(self) -> bytes:
        """What was not looked at, for the next reader."""


class LineReader:
    """A line is a command. CR before the LF is let pass, empty lines are none."""

    def __init__(self, line_bytes: int) -> None:
        self._most = line_bytes
        self._buffer = bytearray()
        self._searched = 0
        #: A line that was too long was refused; what is left of it is nothing.
        self._skipping = False

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> Found | None:
        while True:
            end = self._buffer.find(b"\n", self._searched)
            if end < 0:
                return self._unfinished()
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._searched = 0
            skipped, self._skipping = self._skipping, False
            if skipped:
                continue
            if len(line) > self._most:
                return self._too_long()
            if (found := of_line(line)) is not None:
                return found

    def end(self) -> Found | None:
        line, self._buffer = bytes(self._buffer), bytearray()
        return None if self._skipping else of_line(line)

    def rest(self) -> bytes:
        rest, self._buffer = bytes(self._buffer), bytearray()
        return rest

    def _unfinished(self) -> Found | None:
        self._searched = len(self._buffer)
        if not self._skipping and len(self._buffer) <= self._most:
            return None
        self._buffer.clear()
        self._searched = 0
        if self._skipping:
            return None
        self._skipping = True
        return self._too_long()

    def _too_long(self) -> Mistake:
        return Mistake(f"the line is longer than {self._most} bytes", "shorten it; `--line-bytes` is the limit")


def of_line(line: bytes) -> Found | None:
    try:
        text = line.removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        return Mistake(f"the line is not UTF-8: byte {error.start + 1} is wrong")
    if "\0" in text:
        return Mistake("there is a NUL in the line")
    if (said := _WORDS.fullmatch(text)) is None:
        return None
    name, rest = said[1].upper(), said[2] or ""
    if name not in COMMANDS and _HTTP.fullmatch(text.strip()):
        return Mistake("this is no web server", "`llambo gateway` is", fatal=True)
    if rest.lstrip().startswith("{"):
        return _of_object(name, rest)
    field = COMMANDS.get(name, "")
    if rest.strip() and name in COMMANDS and not field:
        return Mistake(f"{name} takes nothing behind it")
    return command_of(name, {field: rest if name != "LOAD" else rest.strip()} if field and rest else {})


def _of_object(name: str, rest: str) -> Found:
    streamed = name == "INFER_STREAM"
    try:
        fields = msgspec.json.decode(rest, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        hint = 'what begins with { is read as JSON; a prompt that does so goes into {"prompt": ...}'
        return Mistake(f"that is not JSON: {error}", hint, streamed=streamed)
    return command_of(name, fields)


class ObjectReader:
    """An object is a map with its command under `command`. What is no msgpack ends the connection."""

    def __init__(self, object_bytes: int) -> None:
        self._most = object_bytes
        self._unpacker = msgpack.Unpacker(
            max_buffer_size=object_bytes + 2 * SLICE_BYTES,
            max_array_len=LIST_PARTS,
            max_map_len=MAP_PAIRS,
            max_ext_len=0,
            strict_map_key=False,
            unicode_errors="surrogateescape",
        )
        self._waiting: deque[bytes] = deque()
        self._fed = 0
        #: Where the last whole object ended.
        self._done = 0

    def feed(self, data: bytes) -> None:
        self._waiting.extend(data[at : at + SLICE_BYTES] for at in range(0, len(data), SLICE_BYTES))

    def next(self) -> Found | None:
        while True:
            try:
                value = self._unpacker.unpack()
            except msgpack.OutOfData:
                if self._fed - self._done > self._most:
                    return self._too_long()
                if not self._waiting:
                    return None
                data = self._waiting.popleft()
                self._unpacker.feed(data)
                self._fed += len(data)
            except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
                return Mistake(f"that is not msgpack as it may be here: {str(error) or type(error).__name__}",
                               "connect again; what follows cannot be understood", fatal=True)  # fmt: skip
            else:
                size, self._done = self._unpacker.tell() - self._done, self._unpacker.tell()
                return of_value(value) if size <= self._most else self._too_long()

    def end(self) -> Found | None:
        return Mistake("the last object is not whole", fatal=True) if self._fed > self._done else None

    def rest(self) -> bytes:
        return b""

    def _too_long(self) -> Mistake:
        return Mistake(f"the object is longer than {self._most} bytes", "connect again, and shorten it; "
                       "`--line-bytes` is the limit", fatal=True)  # fmt: skip


def of_value(value: Any) -> Found:
    if not isinstance(value, dict) or not isinstance(value.get("command"), str):
        return Mistake("a command is a map with the command's name under `command`")
    fields = {key: item for key, item in value.items() if key != "command"}
    if isinstance(fields.get("prompt"), bytes):
        fields["prompt"] = fields["prompt"].decode(errors="surrogateescape")
    return command_of(value["command"], fields)
