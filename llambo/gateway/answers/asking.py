"""What every API's request boils down to, and what its answer is made of.

An API is three pure things, which never see a socket: the structs it reads (decoded by msgspec), a function that makes
an `Ask` of them, and a `Renderer` that makes events, or one whole body, of the tokens that come back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from llambo.mesh.client.answer_stream import Answer
from llambo.mesh.client.request_options import Options
from llambo.mesh.wire.errors import LlamboError
from llambo.mesh.wire.tokens import Logprob


@dataclass(frozen=True, slots=True)
class Ask:
    """One request for `choices` answers to the same prompt. `options` are those of `Client.stream`."""

    prompt: str
    options: Options
    choices: int = 1
    #: Other prompts of the same request, each with as many choices. They are numbered on.
    more: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a stream. `name` is for APIs that name theirs."""

    data: bytes
    name: str = ""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of one choice. `text` is whole characters: what is missing to one comes with a later token."""

    choice: int
    text: str
    #: -1: no token, but what was left of a character that never became whole.
    id: int
    #: What the token stands for, whole characters or not.
    piece: bytes = b""
    logprob: Logprob | None = None


@dataclass(frozen=True, slots=True)
class About:
    """What is known of an answer before its first token. The same again when a stream is resumed."""

    #: The request's id in the mesh (of the first choice), 32 hex digits.
    id: str
    #: Seconds since 1970.
    created: int
    #: As the caller named it; else as the mesh did.
    model: str


class Renderer(Protocol):
    """Makes the events of one stream. The same tokens give the same events: that is what a resumed stream relies on."""

    def begin(self, about: About) -> Iterable[Event]:
        """Before the first token."""

    def token(self, token: Token) -> Iterable[Event]: ...

    def end(self, choice: int, answer: Answer) -> Iterable[Event]:
        """This choice is complete. `answer.text` is all of it."""

    def done(self, answers: list[Answer]) -> Iterable[Event]:
        """All choices are complete."""

    def failed(self, error: LlamboError) -> Iterable[Event]:
        """It went wrong in the middle; nothing follows."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request as an API has understood it. `whole` makes the body of an answer that is not streamed."""

    ask: Ask
    #: None: the caller wants no stream.
    renderer: Renderer | None
    whole: Callable[[About, list[Answer]], Any] = field(repr=False)


encode = msgspec.json.Encoder().encode
