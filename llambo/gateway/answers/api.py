"""What every API consists of.

An API is two pure things, which never see a socket: a function `parse`, which makes a `Submission` of the body of a
request, and a `Renderer`, which makes the events of a stream of the tokens that come back. The body of an answer that
is not streamed is the fold of the same events: the renderer remembers what they add up to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import msgspec

from llambo.mesh.client.answer_stream import Answer
from llambo.mesh.client.request_options import Options
from llambo.mesh.wire.errors import LlamboError
from llambo.mesh.wire.tokens import Logprob

#: An object of JSON, with any values.
JsonObject = dict[str, Any]


class WholeBody(NamedTuple):
    """The body of a reply that is no stream. `fake`: what is in it is made up."""

    content: object
    fake: bool = False


@dataclass(frozen=True, slots=True)
class Submission:
    """What is submitted to the mesh: `choices` requests for each prompt. `options` are those of `Client.stream`."""

    prompt: str
    options: Options
    choices: int = 1
    #: Further prompts of the same HTTP request. Their choices are numbered after those of the first.
    more: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One event of a stream. `name` is for APIs that name theirs."""

    #: Encoded as JSON; a text is sent as it is.
    data: JsonObject | str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of one choice. `text` has whole characters only: a part of one comes with a later token."""

    choice: int
    text: str
    #: -1: no token, but the rest of a character that was never completed.
    id: int
    #: The bytes of the token, whole characters or not.
    piece: bytes = b""
    logprob: Logprob | None = None


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What is known of an answer before its first token. The same again when a stream is resumed."""

    #: The id of the (first) request in the mesh, 32 hex digits.
    id: str
    #: Seconds since 1970.
    created: int
    #: The name that the caller used; else the name in the mesh.
    model: str


class Renderer(Protocol):
    """Makes the events of one answer. The same tokens give the same events: resuming a stream relies on that."""

    def begin(self, head: AnswerHead) -> Iterable[StreamEvent]:
        """Before the first token."""

    def token(self, token: Token) -> Iterable[StreamEvent]: ...

    def end(self, choice: int, answer: Answer) -> Iterable[StreamEvent]:
        """This choice is complete. `answer.text` is all of it."""

    def done(self, answers: list[Answer]) -> Iterable[StreamEvent]:
        """All choices are complete."""

    def failed(self, error: LlamboError) -> Iterable[StreamEvent]:
        """An error after the first token; nothing follows."""

    def body(self, answers: list[Answer]) -> JsonObject:
        """All events so far as one body, for a caller who wants no stream. Called after `done`."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """The body of a request as an API has understood it."""

    submission: Submission
    renderer: Renderer
    stream: bool


encode = msgspec.json.Encoder().encode
