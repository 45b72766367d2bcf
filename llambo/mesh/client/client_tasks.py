"""What a client can ask for beside answers: tokens of a text, text of tokens, embeddings, what a model is.

Each is a request like any other (see `tasks`), whose result is read whole. A worker that dies on the way costs time.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

import msgspec

from llambo.mesh.client.request_options import checked_request
from llambo.mesh.wire import limits, tasks
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.tokens import Logprob

T = TypeVar("T")
_encode = msgspec.msgpack.Encoder().encode


class TaskCall(TypedDict, total=False):
    """Options of every task; what is left out (or None) takes its default."""

    #: Needed only where the mesh serves several.
    model: str | None
    #: "interactive", "normal" or "batch".
    priority: str | None
    #: It fails when this is over. 0: never.
    deadline_ms: int | None


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Token ids, and what each of them stands for: bytes, because a character may be cut across tokens."""

    ids: list[int]
    pieces: list[bytes]


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector for each text, in their order."""

    vectors: list[list[float]]
    #: How many tokens each text has.
    tokens: list[int]
    #: How the vectors of a text's tokens became one: "mean" or "last".
    pooling: str


class Collector:
    """Holds the pieces of a result until it is whole."""

    def __init__(self) -> None:
        self.result: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._pieces: list[bytes] = []

    def deliver(self, ids: list[int], pieces: list[bytes], logprobs: Sequence[Logprob | None]) -> None:
        self._pieces += pieces

    def place(self, ahead: int, model: str) -> None:
        """Nobody looks."""

    def end(self, end: m.End) -> None:
        if end.reason == "stop":
            self._settle(lambda: self.result.set_result(b"".join(self._pieces)))
        elif end.error is not None:
            self.fail(LlamboError.of(end.error))
        else:
            self.fail(LlamboError(Code.CANCELLED, f"somebody cancelled request {end.id.hex()}"))

    def fail(self, error: LlamboError) -> None:
        self._settle(lambda: self.result.set_exception(error))

    def _settle(self, settle: Callable[[], None]) -> None:
        if not self.result.done():
            settle()


def task_request(
    task: m.Task, inputs: int, input_bytes: int, options: tasks.TaskOptions, call: TaskCall
) -> m.InferenceRequest:
    fields = {name: value for name, value in call.items() if value is not None}
    unknown = sorted(fields.keys() - TaskCall.__optional_keys__)
    if unknown:
        raise LlamboError(Code.BAD_REQUEST, f"no option of {task} is called {unknown[0]!r}")
    return checked_request(
        {**fields, "id": secrets.token_bytes(limits.REQUEST_ID_BYTES), "task": task, "stream": False,
         "sampling": msgspec.Raw(_encode(options)), "max_tokens": tasks.most_pieces(task, inputs, input_bytes)}
    )  # fmt: skip


def decoded(data: bytes, kind: type[T], what: str) -> T:
    """What a broker or worker has sent for a program to read; it may be anything."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise LlamboError(Code.BAD_MESSAGE, f"{what} cannot be read: {error}") from error


def task_input(value: Any) -> bytes:
    try:
        data = _encode(value)
        msgspec.msgpack.decode(data, type=tasks.Texts if value and isinstance(value[0], str) else tasks.Ids)
    except (msgspec.MsgspecError, UnicodeError, TypeError, OverflowError) as error:
        raise LlamboError(Code.BAD_REQUEST, f"the input is not valid: {error}") from error
    if len(data) > limits.PROMPT_BYTES:
        raise LlamboError(Code.TOO_LONG, f"an input of {len(data)} bytes, {limits.PROMPT_BYTES} are allowed")
    return data
