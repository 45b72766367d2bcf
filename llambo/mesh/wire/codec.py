"""Bytes to messages and back, for the control planes.

A control message is a header frame, a body frame and extra frames:

    header   b"llb", framing version (u8), session id (8 bytes, zero before the welcome)
    body     a msgpack array of 1 to 256 messages
    extra    one frame for each message that has one (the prompt), in the order of the messages

Decoding is typed: its result satisfies the schema. A bundle is decoded at once. Only if that fails are its messages
decoded one by one, so that a bad message does not affect the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar, get_args

import msgspec

from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo

MAGIC = b"llb\x01"
NO_SESSION = bytes(limits.SESSION_ID_BYTES)
HEADER_BYTES = len(MAGIC) + limits.SESSION_ID_BYTES

T = TypeVar("T", bound=m.Message)

_encode = msgspec.msgpack.Encoder().encode


class Bundle(msgspec.Struct, Generic[T]):
    """The content of one control message. `problems` has an entry for each message that could not be decoded."""

    session: bytes
    messages: list[tuple[T, bytes]]
    problems: list[m.Problem]


class _Typed(msgspec.Struct):
    type: str | None = None


class _Named(msgspec.Struct):
    """The fields of a bad message that assign the error to its request or query."""

    id: bytes = b""
    query: int = 0


def encode(session: bytes, messages: Sequence[tuple[m.Message, bytes | None]]) -> list[bytes]:
    """The frames of one control message; the extra frames follow in the order of their messages."""
    frames = [MAGIC + session, _encode([message for message, _ in messages])]
    frames += [blob for _, blob in messages if blob is not None]
    return frames


def encode_all(session: bytes, messages: Sequence[tuple[m.Message, bytes | None]]) -> list[list[bytes]]:
    """As many control messages as needed to stay within the limits."""
    if len(messages) <= limits.BUNDLE_MESSAGES:
        frames = encode(session, messages)
        if len(frames[1]) <= limits.CONTROL_BODY_BYTES or len(messages) == 1:
            return [frames]
    half = len(messages) // 2
    return encode_all(session, messages[:half]) + encode_all(session, messages[half:])


class Codec(Generic[T]):
    """Decodes the messages of one kind of peer."""

    def __init__(self, union: Any) -> None:
        self._bundle = msgspec.msgpack.Decoder(list[union]).decode
        self._one = msgspec.msgpack.Decoder(union).decode
        self._types = {kind.__struct_config__.tag for kind in get_args(union)}
        self._parts = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode

    def decode(self, frames: Sequence[bytes]) -> Bundle[T]:
        """Does not raise: every error becomes a problem."""
        wrong = _frame_error(frames)
        if wrong:
            return Bundle(NO_SESSION, [], [wrong])
        session = frames[0][len(MAGIC) :]
        problems: list[m.Problem] = []
        try:
            messages: list[T] = self._bundle(frames[1])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            messages = self._decode_parts(frames[1], problems)
        if len(messages) > limits.BUNDLE_MESSAGES:
            return Bundle(session, [], [_bad(f"more than {limits.BUNDLE_MESSAGES} messages in one bundle")])
        return _with_blobs(session, messages, frames, problems)

    def _decode_parts(self, body: bytes, problems: list[m.Problem]) -> list[T]:
        try:
            parts = self._parts(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            problems.append(_bad(f"the body is not an array of messages: {error}"))
            return []
        messages = []
        for part in parts[: limits.BUNDLE_MESSAGES + 1]:
            try:
                messages.append(self._one(part))
            except msgspec.ValidationError as error:
                code = Code.UNKNOWN_TYPE if self._is_unknown(part) else Code.BAD_MESSAGE
                problems.append(_about(part, ErrorInfo(code, str(error)[:1_000])))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                problems.append(_bad(str(error)[:1_000]))
        return messages

    def _is_unknown(self, part: msgspec.Raw) -> bool:
        """True if it has a type, and it is not one of the messages of these peers."""
        try:
            kind = msgspec.msgpack.decode(part, type=_Typed).type
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return False
        return kind is not None and kind not in self._types


def _bad(text: str) -> m.Problem:
    return m.Problem(ErrorInfo(Code.BAD_MESSAGE, text))


def _about(part: msgspec.Raw, error: ErrorInfo) -> m.Problem:
    try:
        named = msgspec.msgpack.decode(part, type=_Named)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return m.Problem(error)
    return m.Problem(error, named.id[: limits.REQUEST_ID_BYTES], max(0, min(named.query, 2**53)))


def _frame_error(frames: Sequence[bytes]) -> m.Problem | None:
    if len(frames) < 2:
        return _bad(f"{len(frames)} frames, at least a header and a body are needed")
    header = frames[0]
    if len(header) != HEADER_BYTES or header[:3] != MAGIC[:3]:
        return _bad("the header frame is not llambo's")
    if header[3] != MAGIC[3]:
        text = f"framing version {header[3]} is not supported, {MAGIC[3]} is"
        return m.Problem(ErrorInfo(Code.BAD_VERSION, text))
    if len(frames[1]) > limits.CONTROL_BODY_BYTES:
        return _bad(f"a body of {len(frames[1])} bytes, {limits.CONTROL_BODY_BYTES} are allowed")
    return None


def _with_blobs(session: bytes, messages: list[T], frames: Sequence[bytes], problems: list[m.Problem]) -> Bundle[T]:
    """Pair each message with its extra frame. If the numbers differ they cannot be assigned: all are refused."""
    wanted = [type(message) in m.WITH_BLOB for message in messages].count(True)
    if len(frames) - 2 != wanted:
        if not problems or wanted:
            problems.append(_bad(f"{len(frames) - 2} extra frames for {wanted} messages that have one"))
        messages = [message for message in messages if type(message) not in m.WITH_BLOB]
        return Bundle(session, [(message, b"") for message in messages], problems)
    if not wanted:
        return Bundle(session, [(message, b"") for message in messages], problems)
    blobs = iter(frames[2:])
    paired = [(message, next(blobs) if type(message) in m.WITH_BLOB else b"") for message in messages]
    return Bundle(session, paired, problems)


from_client: Codec[Any] = Codec(m.ClientToBroker)
to_client: Codec[Any] = Codec(m.BrokerToClient)
#: On the control plane of workers, where hosts join as well.
from_worker: Codec[Any] = Codec(m.WorkerToBroker | m.HostToBroker)
to_host: Codec[Any] = Codec(m.BrokerToHost)
to_worker: Codec[Any] = Codec(m.BrokerToWorker)
