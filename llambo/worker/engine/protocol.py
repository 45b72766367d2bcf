"""The messages between the agent and its engine child, over one socket pair.

    agent -> engine   configure, start, stop, shutdown
    engine -> agent   progress, ready, step, refused

A message is a msgpack map (its `type` is its name) after its length as u32. Both ends are of one release, so
nothing is negotiated. The engine sends one `Step` per decoding step for all sequences together. While it has
sequences but no token it sends an empty one every ALIVE_MS: an engine that is silent for longer is stalled.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta

from llambo.mesh.wire import limits, naming, tasks
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.messages import Dispatch, Logprobs, ModelInfo, Reason, Sampling, Task, Usage
from llambo.mesh.wire.tasks import TaskOptions
from llambo.mesh.wire.tokens import UNDECODABLE, Logprob
from llambo.worker.config import Adapter, FakeOptions, LlamaOptions, mesh_name

#: One message: the longest prompt and the longest prefix fit.
FRAME_BYTES = 16 * 1024 * 1024
#: An engine with sequences but without tokens sends an empty `Step` this often.
ALIVE_MS = 500
#: Exit status of an engine that cannot load its model.
CANNOT_LOAD = 3

_LENGTH = Struct(">I")

Token = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Piece = Annotated[bytes, Meta(max_length=64 * 1024)]


class EngineMessage(msgspec.Struct, tag_field="type", tag=str.lower, omit_defaults=True, frozen=True, gc=False):
    """Base of the messages between agent and engine."""


# Agent to engine.


class Configure(EngineMessage, frozen=True):
    """The first message: which engine to run, and which model to load."""

    engine: str
    model: str
    fake: FakeOptions = FakeOptions()
    llama: LlamaOptions = LlamaOptions()
    #: An earlier engine died while it was loading: do not use what may not work on this machine.
    safe: bool = False
    #: No engine was started before. What needs to be said once is said by the first.
    first: bool = True
    #: The name of the model in the mesh; empty: that of its file.
    served_as: str = ""
    #: Engines beside it, of other workers, may load at the same time, so there is no progress bar.
    hosted: bool = False

    @property
    def model_name(self) -> str:
        return self.served_as or mesh_name(self.model)


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
    #: The names of the sampling options that the request itself sets. For all others the model may have a default.
    given: list[str] = []
    #: Other than `generate`: produce a result. It is returned in pieces, like tokens; at most `max_tokens` of them.
    task: Task = "generate"
    options: TaskOptions = TaskOptions()


class Stop(EngineMessage, frozen=True):
    """Free the slot of this sequence. There is no answer, and the agent drops tokens that are still on their way."""

    key: bytes


class Shutdown(EngineMessage, frozen=True):
    """Exit now. (A closed pipe means the same.)"""


# Engine to agent.


class Progress(EngineMessage, frozen=True):
    """Still loading; `note` is for people. With a `problem` loading has failed, and this is the last message."""

    note: str = ""
    problem: str = ""
    #: How much of what `note` describes is done; below 0: unknown.
    percent: int = -1
    #: The problem is that there is not enough memory.
    out_of_memory: bool = False


class Ready(EngineMessage, frozen=True):
    """Loaded and tested: what the engine serves, and how many sequences at a time."""

    models: list[ModelInfo]
    slots: int
    note: str = ""
    #: The library that computes, with its version.
    library: str = ""
    #: Memory of the host that this process takes, with what it may still come to take; 0: not measured.
    memory_bytes: int = 0


class Output(msgspec.Struct, array_like=True, frozen=True, gc=False, omit_defaults=True):
    """What one step produced for one sequence. With `end` it is the last output."""

    key: bytes
    ids: Annotated[list[Token], Meta(max_length=limits.CHUNK_TOKENS)]
    pieces: Annotated[list[Piece], Meta(max_length=limits.CHUNK_TOKENS)]
    end: Reason | None = None
    usage: Usage | None = None
    error: ErrorInfo | None = None
    #: One for each token, if they were requested.
    logprobs: Annotated[list[Logprob], Meta(max_length=limits.CHUNK_TOKENS)] | None = None
    #: The stop string that ended it.
    stop: str = ""


class Step(EngineMessage, frozen=True):
    """All outputs of one decoding step. Without outputs it shows that the engine is alive."""

    outputs: list[Output] = []


class Refused(EngineMessage, frozen=True):
    """This sequence was not started. `final`: no other engine would start it either."""

    key: bytes
    error: ErrorInfo
    final: bool = False


ToEngine = Configure | Start | Stop | Shutdown
ToAgent = Progress | Ready | Step | Refused
M = TypeVar("M", bound=EngineMessage)


class BadFrame(Exception):
    """The bytes on the pipe cannot be read; the connection cannot be used any more."""


_encode = msgspec.msgpack.Encoder().encode


def pack(message: EngineMessage) -> bytes:
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


class Unpacker(Generic[M]):
    """From the bytes of the pipe to messages."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[M]) -> None:
        self._decode = decoder.decode
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[M]:
        """Returns the messages that are complete now. Raises BadFrame."""
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

    def _message(self, body: memoryview) -> M:
        try:
            return self._decode(body)
        except UNDECODABLE as error:
            raise BadFrame(f"an invalid message on the engine pipe: {error}") from error
        finally:
            body.release()


def from_agent() -> Unpacker[ToEngine]:
    return Unpacker(msgspec.msgpack.Decoder(ToEngine))


def from_engine() -> Unpacker[ToAgent]:
    return Unpacker(msgspec.msgpack.Decoder(ToAgent))


_decode_sampling = msgspec.msgpack.Decoder(Sampling).decode
_decode_options = msgspec.msgpack.Decoder(TaskOptions).decode
_decode_names = msgspec.msgpack.Decoder(dict[str, msgspec.Raw]).decode


def start_of(dispatch: Dispatch, prompt: bytes) -> Start:
    """The dispatch with its options decoded. Raises what a decoder raises."""
    generates = dispatch.task == "generate"
    return Start(
        key=dispatch.id + dispatch.dispatch,
        prompt=prompt,
        max_tokens=dispatch.max_tokens,
        seed=dispatch.seed,
        prefix=dispatch.prefix,
        sampling=_decode_sampling(dispatch.sampling) if generates else Sampling(),
        deadline_ms=dispatch.deadline_ms,
        model=dispatch.model,
        logprobs=dispatch.logprobs,
        given=list(_decode_names(dispatch.sampling)),
        task=dispatch.task,
        options=TaskOptions() if generates else _decode_options(dispatch.sampling),
    )


# What both engines share.

#: What a fake engine asks of its process after a step.
Fault = Literal["crash", "hang"]


#: The last is that of `model_info`.
TaskResult = tasks.TokenizeResult | tasks.DetokenizeResult | tasks.EmbedResult | tasks.RerankResult | dict[str, Any]


class TaskRefused(Exception):
    """The task cannot be done, on any worker; `info` gives the reason."""

    def __init__(self, code: Code, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.info = ErrorInfo(code, text, hint=hint)


class NoSuchAdapter(TaskRefused):
    """This engine has not loaded it. Another worker may have."""


def adapter_of(asked: str, model: str, adapters: Sequence[Adapter]) -> Adapter | None:
    """The adapter in the name of a model in a dispatch; None: the model alone. Raises NoSuchAdapter."""
    for adapter in adapters:
        name = naming.with_adapter(model, adapter.name)
        if asked == name or asked.startswith(name + naming.MARK):
            return adapter
    if asked.startswith(model + naming.PLUS):
        listed = ", ".join(adapter.name for adapter in adapters) or "none"
        raise NoSuchAdapter(Code.UNKNOWN_MODEL, f"{asked!r} is not served here; adapters of {model}: {listed}")
    return None


def unreadable(start: Start, error: Exception) -> TaskRefused:
    return TaskRefused(Code.BAD_REQUEST, f"the input of {start.task} cannot be read: {error}")


def result_pieces(start: Start, result: TaskResult) -> list[bytes]:
    """The result of a task as it travels. Raises TaskRefused if it is too long."""
    data = _encode(result)
    check_size(start, len(data), f"the result of {start.task}")
    return tasks.pieces_of(data)


def check_size(start: Start, size: int, what: str) -> None:
    most = start.max_tokens * limits.RESULT_PIECE_BYTES
    if size > most:
        raise TaskRefused(Code.TOO_LONG, f"{what} would be {size} bytes; {most} are allowed")


decode_ids = msgspec.msgpack.Decoder(tasks.Ids).decode
decode_texts = msgspec.msgpack.Decoder(tasks.Texts).decode
decode_rerank = msgspec.msgpack.Decoder(tasks.RerankInput).decode

#: The increment of splitmix64.
GOLDEN = 0x9E3779B97F4A7C15
MASK_64 = 2**64 - 1


def mix(value: int) -> int:
    """The finaliser of splitmix64: every bit of the result depends on every bit of the value."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)
