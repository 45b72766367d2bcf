"""One small error tree, translated once at each edge.

An error has a code on the wire. From it follow whose fault it is, the HTTP status of a gateway, whether another try can
help, and a hint for the reader. Cores return `ErrorInfo`; only shells and the client raise.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec
from msgspec import Meta


class Fault(enum.Enum):
    """Whose fault an error is, and so who has to act."""

    CALLER = "caller"  # the request is wrong; sending it again changes nothing
    MESH = "mesh"  # the mesh cannot do it now; another try may help
    PEER = "peer"  # the other end violated the protocol


class Code(enum.StrEnum):
    """The kinds of errors."""

    @classmethod
    def _missing_(cls, value: object) -> Code:
        """A code of a newer release. Its text still explains the error."""
        return cls.INTERNAL

    BAD_MESSAGE = "bad_message"
    BAD_VERSION = "bad_version"
    UNKNOWN_TYPE = "unknown_type"
    UNKNOWN_SESSION = "unknown_session"
    NAME_TAKEN = "name_taken"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    OVER_LIMIT = "over_limit"
    BAD_REQUEST = "bad_request"
    TOO_LONG = "too_long"
    UNKNOWN_MODEL = "unknown_model"
    MODEL_REQUIRED = "model_required"
    UNKNOWN_REQUEST = "unknown_request"
    UNKNOWN_WORKER = "unknown_worker"
    EXPIRED = "expired"
    BUSY = "busy"
    NO_WORKER = "no_worker"
    DEADLINE = "deadline"
    QUEUE_TIMEOUT = "queue_timeout"
    ENGINE_FAILED = "engine_failed"
    NO_BROKER = "no_broker"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    BAD_SETTING = "bad_setting"
    INTERNAL = "internal"


class Trait(msgspec.Struct, frozen=True):
    """The properties of one error code."""

    fault: Fault
    http: int
    retryable: bool
    hint: str


TRAITS: dict[Code, Trait] = {
    Code.BAD_MESSAGE: Trait(Fault.PEER, 400, False, "the sender violated the protocol; see docs/protocol.md"),
    Code.BAD_VERSION: Trait(Fault.PEER, 400, False, "install the same llambo release on both ends"),
    Code.UNKNOWN_TYPE: Trait(Fault.PEER, 400, False, "the other end is older; update it"),
    Code.UNKNOWN_SESSION: Trait(Fault.PEER, 409, True, "send a new hello; the client library does so by itself"),
    Code.NAME_TAKEN: Trait(Fault.CALLER, 409, False, "choose another --name"),
    Code.UNAUTHORIZED: Trait(Fault.CALLER, 401, False, "ask the broker's operator for a key: `llambo keys add NAME`"),
    Code.FORBIDDEN: Trait(Fault.CALLER, 403, False, "use a key with that right; `llambo keys list` shows them"),
    Code.OVER_LIMIT: Trait(Fault.CALLER, 429, True, "try again after the time given, or ask for a higher limit"),
    Code.BAD_REQUEST: Trait(Fault.CALLER, 400, False, "correct the field that is named"),
    Code.TOO_LONG: Trait(Fault.CALLER, 400, False, "shorten the prompt or lower max_tokens"),
    Code.UNKNOWN_MODEL: Trait(
        Fault.CALLER, 404, False, "choose one of those that are listed; to get others: `llambo help models`"
    ),
    Code.MODEL_REQUIRED: Trait(Fault.CALLER, 400, False, "name one: `--model NAME`, or `model` in a request"),
    Code.UNKNOWN_REQUEST: Trait(Fault.CALLER, 404, False, "check the id; `llambo requests` lists the live ones"),
    Code.UNKNOWN_WORKER: Trait(Fault.CALLER, 404, False, "`llambo workers` lists the names"),
    Code.EXPIRED: Trait(Fault.CALLER, 410, False, "the result was deleted after its time; send the request again"),
    Code.BUSY: Trait(Fault.MESH, 429, True, "try again after the time given, or add workers"),
    Code.NO_WORKER: Trait(Fault.MESH, 503, True, "start a `llambo-worker`; `llambo events` shows why others left"),
    Code.DEADLINE: Trait(Fault.MESH, 504, True, "allow more time or ask for fewer tokens"),
    Code.QUEUE_TIMEOUT: Trait(Fault.MESH, 503, True, "try again later, or add workers"),
    Code.ENGINE_FAILED: Trait(Fault.MESH, 502, False, "look at the worker's log; `llambo why ID` shows what happened"),
    Code.NO_BROKER: Trait(Fault.MESH, 503, True, "start one with `llambo-broker` or `llambo up`"),
    Code.TIMEOUT: Trait(Fault.MESH, 504, True, "try again"),
    Code.CANCELLED: Trait(Fault.CALLER, 409, True, "send it again; `llambo why ID` shows who cancelled it"),
    Code.BAD_SETTING: Trait(Fault.CALLER, 400, False, "correct what the message names"),
    Code.INTERNAL: Trait(Fault.MESH, 500, False, "this is a bug in llambo; please report it"),
}


#: Characters of an error text. Stories and events contain error texts.
TEXT_CHARS = 2_000
HINT_CHARS = 500


#: Characters that move a cursor, colour a terminal, break lines unseen, or reverse the direction of text: C0, DEL, C1,
#: U+2028 to U+202E, U+2066 to U+2069. Not line feeds and tabs.
CONTROLS = (*range(9), *range(11, 32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_REPLACED = dict.fromkeys(CONTROLS, "�")


def printable(text: str) -> str:
    """A text of another peer, made safe for terminals and logs."""
    return text.translate(_REPLACED)


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error in a message."""

    code: Code
    text: Annotated[str, Meta(max_length=TEXT_CHARS)]
    retry_after_ms: int = 0
    #: What to do about it, where the sender knows more than the code says.
    hint: Annotated[str, Meta(max_length=HINT_CHARS)] = ""


class LlamboError(Exception):
    """Every error that llambo raises. `code` is its kind, `hint` what to do about it."""

    def __init__(self, code: Code, text: str, retry_after_ms: int = 0, *, hint: str = "") -> None:
        super().__init__(code, text, retry_after_ms)
        #: The kind of error. It is a string as well: "busy".
        self.code: Code = code
        #: What happened.
        self.text: str = text
        #: When to try again, if the broker knows it; otherwise 0.
        self.retry_after_ms: int = retry_after_ms
        #: Replaces the hint of the code where more is known.
        self._hint = hint
        # In a traceback it follows the text.
        if self.hint not in text:
            self.add_note(self.hint)

    def __str__(self) -> str:
        return self.text

    @classmethod
    def of(cls, info: ErrorInfo) -> LlamboError:
        return cls(info.code, printable(info.text), info.retry_after_ms, hint=printable(info.hint))

    @property
    def trait(self) -> Trait:
        return TRAITS[self.code]

    @property
    def hint(self) -> str:
        """What to do about it."""
        return self._hint or self.trait.hint

    @property
    def retryable(self) -> bool:
        """True if the same request may succeed later."""
        return self.trait.retryable

    def info(self) -> ErrorInfo:
        return ErrorInfo(self.code, self.text[:TEXT_CHARS], self.retry_after_ms, self._hint[:HINT_CHARS])
