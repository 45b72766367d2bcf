"""The very same model: which workers can continue an answer, and what is reported where some cannot.

An answer moves only between workers whose model has the same fingerprint (`naming.fingerprint`). Workers that serve a
model under one name with different files or settings look like a spare for each other and are none. So this is
reported when a worker joins, and while a request waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llambo.broker.records.registry import WorkerEntry
from llambo.broker.records.request import AWAITING_RUN, Lane, Request
from llambo.broker.records.state import State
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.naming import flags_of, how_to_match, is_in_class, what_differs, what_it_is, without_adapter


def may_continue(worker: WorkerEntry, lane: Lane) -> bool:
    """It has this very model; or one of that name is being loaded, which may turn out to be the same."""
    if Lane(lane.model, lane.fingerprint) in worker.serving.continuing:
        return True
    loading = worker.state == "starting"
    return loading and any(info.name == lane.model and not info.fingerprint for info in worker.serving.infos)


def is_missing(state: State, lane: Lane) -> bool:
    """No worker that is there can continue the answers in this lane."""
    return bool(lane.fingerprint) and not any(may_continue(each, lane) for each in state.registry.workers.values())


def note_different(state: State, worker: WorkerEntry, now_ms: int) -> None:
    """It has joined, or has loaded its model: an event says if answers cannot move between it and the others."""
    for model, own in worker.serving.fingerprints.items():
        if is_in_class(model, worker.serving.fingerprints):
            continue
        if (base := without_adapter(model)) != model and _differs(state, worker, base):
            continue  # with all of its adapters
        there = next((other for other in _serving(state, model) if other is not worker), None)
        theirs = there.serving.fingerprints[model] if there is not None else own
        if there is None or theirs == own:
            continue
        here, elsewhere = what_differs([own, theirs])
        text = (
            f"worker {worker.name} serves {model} with {here}, {there.name} with {elsewhere}: their answers cannot "
            f"move to each other; start both with {how_to_match([own, theirs])}"
        )
        state.journal.add(now_ms, "worker differs", text, warning=True, worker=worker.name)


def _differs(state: State, worker: WorkerEntry, model: str) -> bool:
    own = worker.serving.fingerprints.get(model, "")
    there = next((other for other in _serving(state, model) if other is not worker), None)
    return there is not None and there.serving.fingerprints[model] != own


def note_waiting(state: State, models: Iterable[str], now_ms: int) -> None:
    """Workers of these models are gone, or serve others now: the story of each request that waits for one says so."""
    names = set(models)
    for lane, line in state.queue.lines.items():
        if lane.model in names and is_missing(state, lane):
            for request in line:
                note_wait(state, request, lane, now_ms)


def note_wait(state: State, request: Request, lane: Lane, now_ms: int) -> None:
    """A step of its story, unless the last step says the same."""
    text = f"for {_wanted(state, lane)}"
    if not request.story or request.story[-1][2] != text:
        request.note(now_ms, "waits", text)


def waits_for(state: State, request: Request) -> str:
    """Of a request that waits: what has to come; empty if it waits for its turn only."""
    lane = request.lane
    if lane == AWAITING_RUN:
        return "the worker that may still run it"
    if note := state.hosts.note(lane.model):
        return note
    if lane.fingerprint:
        return _wanted(state, lane) if is_missing(state, lane) else ""
    if state.models.unserved_since.get(lane.model, 1):
        return f"a worker that serves {lane.model}"
    return _not_drained(state, lane.model)


def _not_drained(state: State, model: str) -> str:
    """An operator has drained all that have the model: what is wanted; otherwise empty."""
    drained = ""
    for worker in state.registry.workers.values() if state.registry.drained else ():
        if model in worker.serving.models:
            if not worker.drain.drained:
                return ""
            drained = drained or worker.name
    return f"a worker of {model}, all of which are drained: `llambo drain {drained} --undo`" if drained else ""


def missing_too_long(state: State, lane: Lane, waited_ms: int) -> ErrorInfo:
    text = (
        f"no worker can continue this answer of {lane.model!r}: for {waited_ms} ms it waited for {_wanted(state, lane)}"
    )
    flags = flags_of(lane.fingerprint)
    hint = f"start one that has the same model file: `llambo-worker {flags}`" if flags else ""
    return ErrorInfo(Code.NO_WORKER, text, 1_000, hint)


def _wanted(state: State, lane: Lane) -> str:
    """`a worker with ctx 2048; aa has ctx 4096`"""
    there = next(_serving(state, lane.model), None)
    if there is None:
        return f"a worker with {what_it_is(lane.fingerprint)}; no worker serves {lane.model}"
    wanted, has = what_differs([lane.fingerprint, there.serving.fingerprints[lane.model]])
    return f"a worker with {wanted}; {there.name} has {has}"


def _serving(state: State, model: str) -> Iterator[WorkerEntry]:
    """Those of which it is known what they have."""
    return (worker for worker in state.registry.workers.values() if model in worker.serving.fingerprints)
