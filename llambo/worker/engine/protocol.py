"""What the agent and its engine child say to each other, over one socket pair.

    agent -> engine   configure, start, stop, shutdown
    engine -> agent   progress, ready, step, refused

A message is a msgpack map (its `type` says which) after its length as u32. Both ends are of one release, so
nothing is negotiated. The engine sends one `Step` per decoding step, whatever the number of sequences in it,
and an empty one now and then while it has sequences but no token: a loop that turns is alive, silence is not.
"""

from __future__ import annotations

from struct import Struct
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import ErrorInfo
from llambo.mesh.wire.messages import Dispatch, Logprobs, ModelInfo, Reason, Sampling, Task, Usage
from llambo.mesh.wire.tasks import TaskOptions
from llambo.mesh.wire.tokens import Logprob
from llambo.worker.engine.engine_options import FakeKnobs, LlamaKnobs

#: One message: a prompt at its longest and a prefix at its longest fit.
FRAME_BYTES = 16 * 1024 * 1024
#: An engine with sequences but without tokens says so this often.
ALIVE_MS = 500
#: What an engine that cannot load its model exits with.
CANNOT_LOAD = 3

_LENGTH = Struct(">I")

Token = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Piece = Annotated[bytes, Meta(max_length=64 * 1024)]


class EngineMessage(msgspec.Struct, tag_field="type", tag=str.lower, omit_defaults=True, frozen=True, gc=False):
    """Anything said between agent and engine."""


# --- agent to engine ---------------------------------------------------------------------------------


class Configure(EngineMessage, frozen=True):
    """The first message: which engine to be, and what to load."""

    engine: str
    model: str
    fake: FakeKnobs = FakeKnobs()
    llama: LlamaKnobs = LlamaKnobs()
    #: An engine before this one died while it was loading: do without whatever might not work on this machine.
    safe: bool = False


class Start(EngineMessage, frozen=True):
    """Generate under this key, after prompt and prefix. `max_tokens` counts the prefix."""

    key: bytes
    prompt: bytes
    max_tokens: int
    seed: int
    prefix: list[int] = []
    sampling: Sampling = Sampling()
    #: Milliseconds from now; 0: no deadline.
    deadline_ms: int = 0
    model: str = ""
    logprobs: Logprobs = None
    #: The names of the sampling options that the request itself has: for all others the model may have a default.
    given: list[str] = []
    #: Not `generate`: make a result. Its pieces come as those of tokens do, and `max_tokens` is how many there may be.
    task: Task = "generate"
    options: TaskOptions = TaskOptions()


class Stop(EngineMessage, frozen=True):
    """Free the slot of this sequence. Nothing is answered, and tokens on their way are dropped by the agent."""

    key: bytes


class Shutdown(EngineMessage, frozen=True):
    """Leave now. (A closed pipe means the same.)"""


# --- engine to agent ---------------------------------------------------------------------------------


class Progress(EngineMessage, frozen=True):
    """Still loading; `note` is for people. With a `problem` it cannot, and this is the last that is heard of it."""

    note: str = ""
    problem: str = ""
    #: Of what `note` speaks of; below 0: that has no percent.
    percent: int = -1


class Ready(EngineMessage, frozen=True):
    """Loaded and proven: this is what it serves, and how many sequences at a time."""

    models: list[ModelInfo]
    slots: int
    note: str = ""


class Output(msgspec.Struct, array_like=True, frozen=True, gc=False, omit_defaults=True):
    """What one step gave one sequence. With `end` it is the last of it."""

    key: bytes
    ids: Annotated[list[Token], Meta(max_length=limits.CHUNK_TOKENS)]
    pieces: Annotated[list[Piece], Meta(max_length=limits.CHUNK_TOKENS)]
    end: Reason | None = None
    usage: Usage | None = None
    error: ErrorInfo | None = None
    #: If they were asked for, one for each token.
    logprobs: Annotated[list[Logprob], Meta(max_length=limits.CHUNK_TOKENS)] | None = None
    #: The stop string that ended it.
    stop: str = ""


class Step(EngineMessage, frozen=True):
    """All that one decoding step produced."""

    outputs: list[Output] = []


class Refused(EngineMessage, frozen=True):
    """This sequence was not started. `final`: no other engine would either."""

    key: bytes
    error: ErrorInfo
    final: bool = False


ToEngine = Configure | Start | Stop | Shutdown
ToAgent = Progress | Ready | Step | Refused


class BadFrame(Exception):
    """The other end of the pipe is broken; there is no way to go on with it."""


_encode = msgspec.msgpack.Encoder().encode


def pack(message: EngineMessage) -> bytes:
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


class Unpacker:
    """Bytes as they come from the pipe, to messages."""

    def __init__(self, union: Any) -> None:
        self._decode = msgspec.msgpack.Decoder(union).decode
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that are complete now. Raises BadFrame."""
        self._buffer += data
        messages, at = [], 0
        with memoryview(self._buffer) as view:
            while len(view) - at >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(view, at)
                if length > FRAME_BYTES:
                    raise BadFrame(f"a message of {length} bytes on the engine pipe")
                end = at + _LENGTH.size + length
                if end > len(view):
                    break
                messages.append(self._message(view[at + _LENGTH.size : end]))
                at = end
        del self._buffer[:at]
        return messages

    def _message(self, body: memoryview) -> Any:
        try:
            return self._decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BadFrame(f"a message that makes no sense on the engine pipe: {error}") from error
        finally:
            body.release()


def from_agent() -> Unpacker:
    return Unpacker(ToEngine)


def from_engine() -> Unpacker:
    return Unpacker(ToAgent)


_decode_sampling = msgspec.msgpack.Decoder(Sampling).decode
_decode_options = msgspec.msgpack.Decoder(TaskOptions).decode
_decode_names = msgspec.msgpack.Decoder(dict[str, msgspec.Raw]).decode


def start_of(dispatch: Dispatch, prompt: bytes) -> Start:
    """What a dispatch is to an engine. Raises what a decoder raises."""
    key, generates = dispatch.id + dispatch.dispatch, dispatch.task == "generate"
    return Start(
        key,
        prompt,
        dispatch.max_tokens,
        dispatch.seed,
        dispatch.prefix,
        _decode_sampling(dispatch.sampling) if generates else Sampling(),
        dispatch.deadline_ms,
        dispatch.model,
        dispatch.logprobs,
        list(_decode_names(dispatch.sampling)),
        dispatch.task,
        TaskOptions() if generates else _decode_options(dispatch.sampling),
    )
