"""Traces of answers: whether they are wanted, and the phases they consist of.

Nothing is traced unless the standard variables of OpenTelemetry say where to send it (`OTEL_EXPORTER_OTLP_ENDPOINT`, or
`OTEL_TRACES_EXPORTER=otlp` for a collector on this host). In that case the extra `otel` has to be installed.

The phases are made of the story of a request once it is over, so nothing has to follow it while it runs:

    queue      it waits for a worker             dispatch   a worker has it and has not accepted it yet
    prefill    the prompt is processed           decode     tokens are made
    run        the work of a worker that did not finish it; the next phase is elsewhere

Times are milliseconds since the broker received the request. The durations of prefill and decode are the engine's;
what lies between them, and after them, is neither.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.messages import Usage
from llambo.mesh.wire.reports import StoryStep

if TYPE_CHECKING:
    from llambo.gateway.observe.otel import OtelTraces

log = logging.getLogger(__name__)

Value = str | int | float | bool

_TO = re.compile(r"to (?P<worker>.+), attempt (?P<attempt>\d+), from token (?P<first>\d+)$")
_FROM = re.compile(r"from (?P<worker>.+), which has ")
#: The reason of an end that is an error. Its text is left out: it may quote the prompt.
_REASON = re.compile(r"tokens, (error|deadline|cancelled)\b")
#: Steps with which a request leaves its worker and waits again.
_LEAVES = ("lost", "refused")


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    begin_ms: float
    end_ms: float
    about: Mapping[str, Value] = field(default_factory=dict)
    #: Empty: none.
    error: str = ""


def phases(story: Iterable[StoryStep], usage: Usage) -> Iterator[Phase]:
    """Also of a story whose middle was dropped: its phases still follow on each other."""
    phase, since = "queue", 0.0
    about: dict[str, Value] = {}
    for step in story:
        what, detail, at = step.what, step.detail, float(step.at_ms)
        if what == "dispatched":
            if phase == "queue":
                yield Phase("queue", since, at)
            phase, since, about = "dispatch", at, _about(_TO.match(detail))
        elif what == "adopted":
            if phase == "queue":
                yield Phase("queue", since, at)
            phase, since, about = "run", at, _about(_FROM.match(detail))
        elif what == "accepted" and phase == "dispatch":
            yield Phase("dispatch", since, at, about)
            phase, since = "run", at
        elif what in _LEAVES and phase != "queue":
            # A refusal may quote the prompt.
            yield Phase(phase, since, at, about, f"lost: {detail}" if what == "lost" else what)
            phase, since = "queue", at
        elif what == "worker done" and phase == "run":
            yield from _done(since, at, about, usage)
            phase = ""
        elif what == "ended" and phase:
            found = _REASON.search(detail)
            yield Phase(phase, since, at, about if phase != "queue" else {}, found[1] if found else "")
            phase = ""


def _about(found: re.Match[str] | None) -> dict[str, Value]:
    if found is None:
        return {}
    named: dict[str, Value] = {f"llambo.{name}": text for name, text in found.groupdict().items()}
    return {name: int(text) if name != "llambo.worker" else text for name, text in named.items()}


def _done(since: float, at: float, about: dict[str, Value], usage: Usage) -> Iterator[Phase]:
    """The durations that the engine measured, within the times that the broker saw."""
    if not usage.prefill_ms and not usage.decode_ms:
        yield Phase("run", since, at, about)
        return
    read = min(since + usage.prefill_ms, at)
    yield Phase("prefill", since, read, about | {"llambo.cached_tokens": usage.cached_tokens})
    yield Phase("decode", max(read, at - usage.decode_ms), at, about)


def traces_of(environ: Mapping[str, str]) -> OtelTraces | None:
    """None: no traces are wanted. Raises LlamboError if the variables ask for what is not supported."""
    named = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    where = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or named == "none" or not (where or named):
        return None
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if named not in ("", "otlp") or protocol not in (None, "", "http/protobuf"):
        text = f"traces are sent by OTLP over HTTP only, not by {named or 'otlp'} over {protocol or 'http/protobuf'}"
        raise LlamboError(Code.BAD_SETTING, text)
    try:
        from llambo.gateway.observe import otel  # noqa: PLC0415  # an optional dependency
    except ImportError as error:
        text = f"traces are requested (OTEL_...), but the package {error.name} is missing"
        raise LlamboError(Code.BAD_SETTING, f"{text}; pip install 'llambo[otel]'") from error
    log.info("traces are sent to %s", where or "the collector on this host")
    is_named = "OTEL_SERVICE_NAME" in environ or "service.name" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return otel.sender(is_named)
