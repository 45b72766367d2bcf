"""A request's story as spans."""

from __future__ import annotations

from itertools import pairwise

import pytest

from llambo.gateway import tracing
from llambo.gateway.server import traces_of
from llambo.gateway.tracing import Phase
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.messages import Usage
from llambo.mesh.wire.reports import StoryStep

USAGE = Usage(prompt_tokens=12, cached_tokens=5, prefill_ms=30.0, decode_ms=50.0)


def story(*entries: tuple[int, str, str]) -> list[StoryStep]:
    return [StoryStep(at_ms=at, what=what, detail=detail) for at, what, detail in entries]


def times(steps: list[StoryStep], usage: Usage = Usage()) -> list[tuple[str, float, float]]:  # noqa: B008
    return [(span.name, span.begin_ms, span.end_ms) for span in tracing.phases(steps, usage)]


def test_queue_dispatch_prefill_and_decode() -> None:
    steps = story(
        (0, "submitted", "model m, at most 9 tokens, normal"),
        (40, "dispatched", "to w-1, attempt 1, from token 0"),
        (45, "accepted", ""),
        (130, "worker done", "9 tokens, length"),
        (131, "ended", "9 tokens, length"),
    )
    on: dict[str, str | int | float | bool] = {"llambo.worker": "w-1", "llambo.attempt": 1, "llambo.first": 0}
    assert list(tracing.phases(steps, USAGE)) == [
        Phase("queue", 0, 40),
        Phase("dispatch", 40, 45, on),
        Phase("prefill", 45, 75, on | {"llambo.cached_tokens": 5}),
        Phase("decode", 80, 130, on),
    ]
    assert times(steps)[2:] == [("run", 45, 130)]  # an engine that says no times


def test_times_of_an_engine_stay_within_what_the_broker_saw() -> None:
    steps = story((0, "dispatched", "to w, attempt 1, from token 0"), (0, "accepted", ""), (50, "worker done", ""))
    assert times(steps, USAGE)[2:] == [("prefill", 0, 30), ("decode", 30, 50)]
    assert times(steps, Usage(prefill_ms=9_000, decode_ms=9_000))[2:] == [("prefill", 0, 50), ("decode", 50, 50)]


def test_a_move_is_seen_and_why() -> None:
    steps = story(
        (0, "submitted", ""),
        (1, "dispatched", "to w1, attempt 1, from token 0"),
        (2, "accepted", ""),
        (50, "engine died", "that of w1: killed by signal 11"),
        (50, "lost", "the engine of w1 died"),
        (70, "dispatched", "to w2, attempt 2, from token 17"),
        (71, "refused", "by w2: no room for 'my secret prompt'"),
        (71, "dispatched", "to w3, attempt 3, from token 17"),
        (72, "accepted", ""),
        (90, "worker done", ""),
        (90, "ended", "20 tokens, length"),
    )
    found = list(tracing.phases(steps, Usage()))
    assert [(span.name, span.error) for span in found] == [
        ("queue", ""),
        ("dispatch", ""),
        ("run", "lost: the engine of w1 died"),
        ("queue", ""),
        ("dispatch", "refused"),
        ("queue", ""),
        ("dispatch", ""),
        ("run", ""),
    ]
    assert found[-1].about == {"llambo.worker": "w3", "llambo.attempt": 3, "llambo.first": 17}
    assert all(one.end_ms == next_one.begin_ms for one, next_one in pairwise(found))


@pytest.mark.parametrize(
    ("last", "name", "error"),
    [
        ((30, "ended", "0 tokens, error: waited 30 ms for a worker, 'my secret prompt'"), "queue", "error"),
        ((30, "ended", "0 tokens, cancelled"), "queue", "cancelled"),
    ],
)
def test_an_end_in_the_queue(last: tuple[int, str, str], name: str, error: str) -> None:
    assert list(tracing.phases(story((0, "submitted", ""), last), Usage(), error)) == [Phase(name, 0, 30, {}, error)]


def test_an_adopted_run_and_a_story_without_its_middle() -> None:
    steps = story(
        (0, "submitted", ""),
        (0, "resumed", "its client holds 7 tokens"),
        (9, "adopted", "from w 1, which has 9 tokens; 7 held"),
        (20, "worker done", ""),
        (20, "ended", "20 tokens, stop"),
    )
    assert times(steps) == [("queue", 0, 9), ("run", 9, 20)]
    assert list(tracing.phases(steps, Usage()))[1].about == {"llambo.worker": "w 1"}
    assert times(story((0, "submitted", ""), (900, "accepted", ""), (950, "ended", "3 tokens, stop"))) == [
        ("queue", 0, 950)
    ]
    assert list(tracing.phases(story(), Usage())) == []


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_SERVICE_NAME": "x"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_nothing_is_traced_unless_it_is_asked_for(environ: dict[str, str]) -> None:
    assert traces_of(environ) is None


@pytest.mark.parametrize(
    "environ",
    [
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        {"OTEL_TRACES_EXPORTER": "zipkin"},
    ],
)
def test_what_cannot_be_done_is_reported(environ: dict[str, str]) -> None:
    with pytest.raises(LlamboError, match="OTLP over HTTP only") as refused:
        traces_of(environ)
    assert refused.value.code is Code.BAD_SETTING
