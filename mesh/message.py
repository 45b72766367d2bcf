"""What all messages are made of: the base class, and types that carry their limits."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from llambo.mesh import limits

#: The versions of the protocol this release speaks.
VERSIONS = (1, 1)

#: Request id and dispatch id together.
KEY_BYTES = limits.REQUEST_ID_BYTES + limits.DISPATCH_ID_BYTES
RequestId = Annotated[bytes, Meta(min_length=limits.REQUEST_ID_BYTES, max_length=limits.REQUEST_ID_BYTES)]
DispatchId = Annotated[bytes, Meta(min_length=limits.DISPATCH_ID_BYTES, max_length=limits.DISPATCH_ID_BYTES)]
#: Where there need not be one: then it is empty.
NoDispatchId = Annotated[bytes, Meta(max_length=limits.DISPATCH_ID_BYTES)]
#: A run of a worker: request id + dispatch id.
RunKey = Annotated[bytes, Meta(min_length=limits.RUN_KEY_BYTES, max_length=limits.RUN_KEY_BYTES)]
SessionId = Annotated[bytes, Meta(min_length=limits.SESSION_ID_BYTES, max_length=limits.SESSION_ID_BYTES)]
Name = Annotated[str, Meta(max_length=limits.NAME_CHARS)]
Count = Annotated[int, Meta(ge=0, le=limits.TOKEN_INDEX)]
Number = Annotated[int, Meta(ge=0, le=limits.BEAT_NUMBER)]
Milliseconds = Annotated[int, Meta(ge=0, le=10**12)]
Port = Annotated[int, Meta(ge=1, le=65_535)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Priority = Literal["interactive", "normal", "batch"]
#: What a request wants: an answer, or something that is made at once and is no stream of tokens (see `tasks`).
Task = Literal["generate", "tokenize", "detokenize", "embed", "model_info"]
#: How many of the likeliest tokens are told beside each; None: not even the token's own logprob.
Logprobs = Annotated[int, Meta(ge=0, le=limits.TOP_LOGPROBS)] | None
Reason = Literal["stop", "length", "cancelled", "deadline", "error"]


def _tag(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class Message(msgspec.Struct, tag_field="type", tag=_tag, omit_defaults=True, frozen=True, gc=False):
    """Anything that may stand in a control bundle."""
