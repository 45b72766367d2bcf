"""What happened to a request in the mesh, as spans: made of its story once it is over, so that nobody had to watch.

    queue      it waited for a worker            dispatch   it was with a worker that had not begun yet
    prefill    the prompt was read               decode     tokens were made
    run        what a worker did that did not finish it; the next phase begins elsewhere

Times are milliseconds since the request came to its broker. How long prefill and decoding took is the engine's word;
between them, and after, lies what is neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llambo.mesh.wire.messages import Usage

Value = str | int | float | bool

_TO = re.compile(r"to (?P<worker>.+), attempt (?P<attempt>\d+), from token (?P<first>\d+)$")
_FROM = re.compile(r"from (?P<worker>.+), which has ")
#: The reason of an end that nobody wished for. Its text is left out: it may quote what was asked.
_REASON = re.compile(r"tokens, (error|deadline|cancelled)\b")
#: With these a request leaves its worker, and waits again.
_LEAVES = ("lost", "refused")


@dataclass(frozen=True, slots=True)
class Span:
    name: str
    begin_ms: float
    end_ms: float
    about: Mapping[str, Value] = field(default_factory=dict)
    #: What went wrong in it.
    error: str = ""


def spans(told: Mapping[str, Any], usage: Usage) -> list[Span]:
    """`told` is what `Client.why` says. One that has lost its middle still makes spans that follow on each other."""
    return list(_spans(told["story"], usage))


def _spans(story: list[dict[str, Any]], usage: Usage) -> Iterator[Span]:
    phase, since = "queue", 0.0
    about: dict[str, Value] = {}
    for entry in story:
        what, detail, at = entry["what"], entry["detail"], float(entry["at_ms"])
        if what == "dispatched":
            if phase == "queue":
                yield Span("queue", since, at)
            phase, since, about = "dispatch", at, _about(_TO.match(detail))
        elif what == "adopted":
            if phase == "queue":
                yield Span("queue", since, at)
            phase, since, about = "run", at, _about(_FROM.match(detail))
        elif what == "accepted" and phase == "dispatch":
            yield Span("dispatch", since, at, about)
            phase, since = "run", at
        elif what in _LEAVES and phase != "queue":
            # A refusal may quote what was asked.
            yield Span(phase, since, at, about, f"lost: {detail}" if what == "lost" else what)
            phase, since = "queue", at
        elif what == "worker done" and phase == "run":
            yield from _done(since, at, about, usage)
            phase = ""
        elif what == "ended" and phase:
            found = _REASON.search(detail)
            yield Span(phase, since, at, about if phase != "queue" else {}, found[1] if found else "")
            phase = ""


def _about(found: re.Match[str] | None) -> dict[str, Value]:
    if found is None:
        return {}
    named: dict[str, Value] = {f"llambo.{name}": text for name, text in found.groupdict().items()}
    return {name: int(text) if name != "llambo.worker" else text for name, text in named.items()}


def _done(since: float, at: float, about: dict[str, Value], usage: Usage) -> Iterator[Span]:
    """The engine's own times, held between those that the broker saw."""
    if not usage.prefill_ms and not usage.decode_ms:
        yield Span("run", since, at, about)
        return
    read = min(since + usage.prefill_ms, at)
    yield Span("prefill", since, read, about | {"llambo.cached_tokens": usage.cached_tokens})
    yield Span("decode", max(read, at - usage.decode_ms), at, about)
