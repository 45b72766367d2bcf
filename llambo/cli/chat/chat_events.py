"""What a chat is told, and what it orders: facts in the past tense, orders in the imperative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llambo.cli.chat.chat_session import Ending, Session, Turn

Tone = Literal["plain", "quiet", "warning", "error"]
#: (role, content), as a model's template reads them.
Messages = tuple[tuple[str, str], ...]


# --- facts ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entered:
    """The person has said this: a command, or something for the model."""

    text: str
    at: int


@dataclass(frozen=True, slots=True)
class Learned:
    """How much the model can have in mind; 0: without a limit."""

    context_tokens: int


@dataclass(frozen=True, slots=True)
class Counted:
    """So many tokens the messages would be."""

    tokens: int


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer is over, whole or not. With `problem` it failed after that much of it."""

    answer: str
    ending: Ending
    tokens: int = 0
    prompt_tokens: int = 0
    model: str = ""
    problem: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """What was ordered last cannot be had."""

    problem: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The person did not want to wait, and no answer had begun."""


@dataclass(frozen=True, slots=True)
class ModelsFound:
    names: tuple[str, ...]
    #: What was looked for; empty: nothing in particular.
    wanted: str


@dataclass(frozen=True, slots=True)
class Kept:
    """The session is in its file, under this name now."""

    session: Session
    path: str


@dataclass(frozen=True, slots=True)
class Opened:
    session: Session


Event = Entered | Learned | Counted | Answered | Failed | Interrupted | ModelsFound | Kept | Opened


# --- orders --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Say:
    text: str
    tone: Tone = "plain"


@dataclass(frozen=True, slots=True)
class ShowTurn:
    """A turn as it was."""

    number: int
    turn: Turn


@dataclass(frozen=True, slots=True)
class ShowStatus:
    """These facts about the chat, and what is to be said of the mesh."""

    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Learn:
    """Ask what the model is."""

    model: str


@dataclass(frozen=True, slots=True)
class Count:
    """Ask the model how many tokens these are."""

    model: str
    messages: Messages


@dataclass(frozen=True, slots=True)
class Ask:
    model: str
    messages: Messages
    max_tokens: int
    #: How often this was asked before: another try should not give the same again.
    tries: int = 0


@dataclass(frozen=True, slots=True)
class Refuse:
    """The question cannot be sent: it has no room."""

    problem: str


@dataclass(frozen=True, slots=True)
class FindModels:
    wanted: str


@dataclass(frozen=True, slots=True)
class Keep:
    """Write the session into its file, without a word if that works."""

    session: Session


@dataclass(frozen=True, slots=True)
class KeepAs:
    """Write it under another name, and go on there."""

    session: Session
    name: str


@dataclass(frozen=True, slots=True)
class Open:
    name: str


@dataclass(frozen=True, slots=True)
class Leave:
    pass


Order = Say | ShowTurn | ShowStatus | Learn | Count | Ask | Refuse | FindModels | Keep | KeepAs | Open | Leave
