"""What a client can ask for beside answers: tokens of a text, text of tokens, embeddings, what a model is.

Each is a request like any other (see `tasks`), whose result is read whole. A worker that dies on the way costs time.
"""

from __future__ import annotations

import asyncio
import secrets
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar, Unpack

import msgspec

from llambo.mesh.client.request_options import checked_request, encode_prompt
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


class TaskCalls:
    """The part of a client that runs tasks."""

    async def tokenize(
        self,
        text: str,
        *,
        special: bool = False,
        form: tasks.Form = "text",
        system: str = "",
        **call: Unpack[TaskCall],
    ) -> Tokenized:
        """The tokens a prompt of this text has. With `form` "user" or "messages": put into the model's template.

        `special`: names of control tokens in the text mean those tokens.
        """
        data = encode_prompt(text)
        options = tasks.TaskOptions(form=form, system=system, special=special)
        found = await self._task("tokenize", data, 1, options, call, tasks.TokenizeResult)
        return Tokenized(found.ids, found.pieces)

    async def detokenize(self, ids: Sequence[int], *, special: bool = False, **call: Unpack[TaskCall]) -> str:
        """The text of these tokens. `special`: control tokens are shown by their names and not left out."""
        options = tasks.TaskOptions(special=special)
        found = await self._task("detokenize", _input(list(ids)), len(ids), options, call, tasks.DetokenizeResult)
        return found.text.decode(errors="replace")

    async def embed(
        self,
        texts: str | Sequence[str],
        *,
        normalized: bool = True,
        pooling: tasks.Pooling = "",
        **call: Unpack[TaskCall],
    ) -> Embeddings:
        """Vectors for texts: what a model makes of each, as numbers to compare. Many at once cost less than one by one.

        `pooling`: "mean" or "last"; left out, as the model was made for, or the mean.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        if not 0 < len(given) <= limits.EMBED_INPUTS:
            raise LlamboError(Code.BAD_REQUEST, f"{len(given)} texts to embed, 1 to {limits.EMBED_INPUTS} may be")
        options = tasks.TaskOptions(normalized=normalized, pooling=pooling)
        found = await self._task("embed", _input(given), len(given), options, call, tasks.EmbedResult)
        try:
            return Embeddings(tasks.vectors_of(found), found.tokens, found.pooling)
        except ValueError as error:
            raise LlamboError(Code.BAD_MESSAGE, f"the result of embed cannot be read: {error}") from error

    async def model_info(self, **call: Unpack[TaskCall]) -> dict[str, Any]:
        """What a model is, how it is served, and what a request gets that leaves its sampling open."""
        return await self._task("model_info", b"", 1, tasks.TaskOptions(), call, dict[str, Any])

    async def _task(
        self, task: m.Task, data: bytes, inputs: int, options: tasks.TaskOptions, call: TaskCall, kind: type[T]
    ) -> T:
        """Run it, and read its result. Giving up the wait cancels it."""
        id = secrets.token_bytes(limits.REQUEST_ID_BYTES)
        fields = {name: value for name, value in call.items() if value is not None}
        unknown = sorted(fields.keys() - TaskCall.__optional_keys__)
        if unknown:
            raise LlamboError(Code.BAD_REQUEST, f"no option of {task} is called {unknown[0]!r}")
        request = checked_request(
            {**fields, "id": id, "task": task, "stream": False, "sampling": msgspec.Raw(_encode(options)),
             "max_tokens": tasks.most_pieces(task, inputs, len(data))}
        )  # fmt: skip
        collector = Collector()
        self._begin_task(request, data, collector)
        try:
            result = await collector.result
        except asyncio.CancelledError:
            self._drop_task(id)
            raise
        return decoded(result, kind, f"the result of {task}")

    @abstractmethod
    def _begin_task(self, request: m.InferenceRequest, data: bytes, collector: Collector) -> None: ...

    @abstractmethod
    def _drop_task(self, id: bytes) -> None: ...


def decoded(data: bytes, kind: type[T], what: str) -> T:
    """What a broker or worker has sent for a program to read; it may be anything."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise LlamboError(Code.BAD_MESSAGE, f"{what} cannot be read: {error}") from error


def _input(value: Any) -> bytes:
    try:
        data = _encode(value)
        msgspec.msgpack.decode(data, type=tasks.Texts if value and isinstance(value[0], str) else tasks.Ids)
    except (msgspec.MsgspecError, UnicodeError, TypeError, OverflowError) as error:
        raise LlamboError(Code.BAD_REQUEST, f"the input is not valid: {error}") from error
    if len(data) > limits.PROMPT_BYTES:
        raise LlamboError(Code.TOO_LONG, f"an input of {len(data)} bytes, {limits.PROMPT_BYTES} are allowed")
    return data
