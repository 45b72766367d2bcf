"""Fields that are llambo's own, in APIs that have none of the kind; and a limit of llambo's, told by their names."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from llambo.gateway.openai_common import schema_text
from llambo.gateway.problems import FieldError
from llambo.mesh import limits
from llambo.mesh.client_options import Options
from llambo.mesh.message import Priority


class Own(msgspec.Struct, kw_only=True):
    #: The same seed gives the same chances.
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    priority: Priority | None = None
    deadline_ms: Annotated[int, Meta(ge=1, le=2**31)] | None = None


def own_options(asked: Own) -> Options:
    return {
        # The mesh takes none below zero.
        "seed": None if asked.seed is None else asked.seed % 2**63,
        "priority": asked.priority,
        "deadline_ms": asked.deadline_ms,
    }


def bounded_schema(schema: dict[str, Any], field: str) -> str:
    text = schema_text(schema)
    if len(text) > limits.GRAMMAR_CHARS:
        raise FieldError(field, f"{field}: {len(text)} characters of JSON, {limits.GRAMMAR_CHARS} may be")
    return text
