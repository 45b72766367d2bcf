"""Answers that outlive their broker.

What a broker knows dies with it, but nothing is lost: the client has its prompt and the tokens it was given, the
worker has the prompt and all tokens, and goes on making more. Both come to the next broker, in whatever order.

    the worker says     I run this, and nobody wants it                (orphan)      kept until somebody asks for it
    the client says     I had this, and these are the tokens I hold    (resume)      waits `adopt_ms` for such a worker

A run whose tokens begin with those the client holds is adopted: it goes on as if nothing had been, and is not
computed again. If there are several, the latest attempt is taken, and the others are stopped. If none comes in time,
another run continues after the client's tokens. Either way what a client was given never changes.
"""

from __future__ import annotations

from llambo.broker.actions import ToWorker
from llambo.broker.records.archive import Ended
from llambo.broker.records.orphans import Orphan
from llambo.broker.records.registry import ClientEntry, WorkerEntry
from llambo.broker.records.request import Request, RequestState
from llambo.broker.records.state import State
from llambo.broker.requests import delivery, dispatching, ending
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import tokens, transfer


def announced(state: State, worker: WorkerEntry, said: m.Orphan, blob: bytes, now_ms: int) -> None:
    """A worker has a run that has lost its broker, perhaps us in a former life."""
    work = said.work
    try:
        prompt, chunks = transfer.unpack(blob, work.prompt_bytes)
    except ValueError as error:
        state.happened(now_ms, "bad orphan", f"{worker.name}: {error}", warning=True, worker=worker.name)
        _dismiss(state, worker, work)
        return
    orphan = Orphan(worker, work, prompt, [_keyed(chunk, work) for chunk in chunks], now_ms + state.config.orphan_ms)
    request = state.requests.get(work.id)
    if request is not None:
        if request.state is RequestState.WAITING and _fits(request, orphan):
            _adopt(state, request, orphan, now_ms)
        elif request.key == orphan.key and request.worker is worker:
            _say_adopt(state, orphan)  # it was told of twice, and the first time we took it
        else:
            _dismiss(state, worker, work)
    elif (
        state.archive.get(work.id)
        or state.held_bytes + state.orphanage.bytes + orphan.size > state.config.transcript_bytes
    ):
        _dismiss(state, worker, work)
    else:
        state.orphanage.add(orphan)
        asked = [
            early.message
            for (_, id), early in state.early.items()
            if id == work.id and early.client.identity.owns(work.owner)
        ]
        waiting = next((message for message in asked if isinstance(message, m.Attach)), None)
        if waiting is not None or said.home:
            look_for(state, waiting or m.Attach(work.id), now_ms)


def resume(state: State, request: Request, now_ms: int) -> None:
    """A request from another broker's life: it waits apart until its run is found, or is not."""
    request.parked = True
    state.room.put(request, now_ms)
    if request.transcript.next_index:
        request.note(now_ms, "resumed", f"its client holds {request.transcript.next_index} tokens")
    if dispatching.finish_complete(state, request, now_ms):
        _dismiss_others(state, request.id, b"")
        return
    if not _claim(state, request, now_ms):
        state.alarm(now_ms + state.config.adopt_ms, "adopt", request.id)


def look_for(state: State, asked: m.Attach, now_ms: int) -> None:
    """Somebody wants to follow it. If it was meant to run without its client, nobody else has to ask for it."""
    if asked.id not in state.orphanage or asked.id in state.requests or state.archive.get(asked.id):
        return
    given = tokens.ids_of(asked.held)
    orphans = state.orphanage.take(asked.id)
    fitting = [o for o in orphans if o.work.detached and tokens.ids_of(o.chunks)[: len(given)] == given]
    for orphan in orphans:
        if not fitting:
            state.orphanage.add(orphan)
        elif orphan is fitting[0]:
            _take_in(state, orphan, now_ms)
        else:
            _dismiss(state, orphan.worker, orphan.work)


def give_up(state: State, request: Request, now_ms: int) -> None:
    """An alarm rang: nobody has announced it. Another run goes on from here."""
    if request.parked and request.state is RequestState.WAITING:
        _dismiss_others(state, request.id, b"")
        state.room.left(request)
        request.parked = False
        request.queued_ms += now_ms - request.queued_at
        request.note(now_ms, "not adopted", "no worker announced it; it goes on elsewhere")
        dispatching.enqueue(state, request, now_ms)


def agrees(request: Request, held: list[bytes]) -> bool:
    """Whether what this client was given is what others are given. One that still waits apart may learn from it."""
    ours, theirs = request.transcript.ids(), tokens.ids_of(held)
    if len(theirs) > len(ours) and request.parked and theirs[: len(ours)] == ours:
        request.transcript.restore(held)
        return True
    return ours[: len(theirs)] == theirs


def _claim(state: State, request: Request, now_ms: int) -> bool:
    """Adopt the latest run that fits. The others are of no use to anybody."""
    found = False
    for orphan in state.orphanage.take(request.id):
        if not found and _fits(request, orphan):
            found = True
            _adopt(state, request, orphan, now_ms)
        elif not found and _outdated(request, orphan):
            state.orphanage.add(orphan)
        else:
            _dismiss(state, orphan.worker, orphan.work)
    return found


def _outdated(request: Request, orphan: Orphan) -> bool:
    """What was told of this run is less than its client got of it later, through another broker that adopted it.

    So it is no orphan; or it is one again, and then its worker tells us anew, with all it has. We wait for that.
    """
    known, given = tokens.ids_of(orphan.chunks), request.transcript.ids()
    return len(known) < len(given) and given[: len(known)] == known


def _fits(request: Request, orphan: Orphan) -> bool:
    """It is the same owner and model, and all that was given out already is what this run has said."""
    if orphan.work.owner != request.owner:
        return False
    fingerprint = orphan.worker.fingerprints.get(orphan.work.model, "")
    if request.model != orphan.work.model or request.fingerprint not in ("", fingerprint):
        return False
    given = request.transcript.ids()
    return tokens.ids_of(orphan.chunks)[: len(given)] == given


def _adopt(state: State, request: Request, orphan: Orphan, now_ms: int) -> None:
    """As if it had been dispatched to that worker just now, only that it runs already."""
    worker, key, work = orphan.worker, orphan.key, orphan.work
    held = request.transcript.next_index
    request.step(RequestState.DISPATCHED)
    state.room.left(request)
    request.parked = False
    request.queued_ms += now_ms - request.queued_at
    request.attempt = max(request.attempt, orphan.attempt)
    request.key, request.worker, request.blame = key, worker, worker.name
    request.fingerprint = worker.fingerprints.get(request.model, "")
    state.take_off(request)
    worker.adopted.add(key)
    if work.suspect is not None and work.suspect >= held and request.suspect_at < 0:
        request.suspect_at, request.suspicion = work.suspect, "one before its broker was gone"
    if request.suspect_at >= 0:
        request.watched = True
        worker.suspect = key, request
    state.update_pools(worker)
    state.counters.adopted += 1
    _dismiss_others(state, request.id, key)
    request.note(
        now_ms, "adopted", f"from {worker.name}, which has {transfer.count(orphan.chunks)} tokens; {held} held"
    )
    _say_adopt(state, orphan)
    delivery.tokens_arrived(state, orphan.chunks, now_ms)
    state.meter.adopted(request, worker.hello.node_class)


def _say_adopt(state: State, orphan: Orphan) -> None:
    worker = orphan.worker
    worker.seq += 1
    worker.claims[orphan.key] = worker.seq
    state.update_pools(worker)
    state.touch(worker)  # it may be one that is to be emptied
    adopt = m.Adopt(orphan.work.id, orphan.work.dispatch, worker.seq)
    state.out.append(ToWorker(worker.route, worker.session, adopt))


def _take_in(state: State, orphan: Orphan, now_ms: int) -> None:
    """It was meant to run without its client, so nobody may come and ask for a long time."""
    work = orphan.work
    asked = m.InferenceRequest(
        work.id, work.model, work.max_tokens, work.stream, work.priority, work.deadline_ms, True, work.seed,
        sampling=work.sampling, logprobs=work.logprobs, task=work.task,
    )  # fmt: skip
    request = Request(asked, work.model, orphan.prompt, now_ms, state.accounts.of(work.owner))
    state.admit(request)
    request.parked = True
    state.room.put(request, now_ms)
    _adopt(state, request, orphan, now_ms)


def _dismiss_others(state: State, id: bytes, key: bytes) -> None:
    for orphan in state.orphanage.take(id):
        if orphan.key != key:
            _dismiss(state, orphan.worker, orphan.work)


def _dismiss(state: State, worker: WorkerEntry, work: m.Dispatch) -> None:
    state.out.append(ToWorker(worker.route, worker.session, m.Cancel(work.id, work.dispatch)))


def _keyed(chunk: bytes, work: m.Dispatch) -> bytes:
    """Chunks of earlier attempts bear other keys; what comes in is let in by the current one."""
    return tokens.CHUNK + work.id + work.dispatch + chunk[tokens.KEY_END :]


# --- Clients that were elsewhere: with another broker, and now they are back, or have come from one. ---
#
# A client follows one broker at a time and believes that one alone. So what this broker knows of a request may be out
# of date. While its client was away the request was cancelled here, since it had no follower; or it went on here in one
# way and there in another. The client has the prompt and every token it was given, so its word holds: what does not fit
# is forgotten, and the request begins again, as one from a broker that is gone (see above). The exception: another
# client follows it here and was given other tokens. Then both cannot be served, and the follower that is here stays.


def make_way(state: State, client: ClientEntry, asked: m.InferenceRequest, held: list[bytes], now_ms: int) -> None:
    """Before a submit is looked at: forget what is known of it, if that is of no use to its client."""
    request = state.requests.get(asked.id)
    ended = state.archive.get(asked.id)
    if request is not None and held and not agrees(request, held):
        if _all_his(state, client, request.followers):
            ending.forget(state, request, now_ms)
    elif ended is not None and not _serves(ended, asked, held) and _all_his(state, client, ended.owed):
        state.archive.forget(asked.id)


def fits(ended: Ended, held: list[bytes]) -> bool:
    """Whether these are the first tokens of what it was."""
    if ended.transcript is None or not held:
        return True
    ours, theirs = ended.transcript.ids(), tokens.ids_of(held)
    return ours[: len(theirs)] == theirs


def _serves(ended: Ended, asked: m.InferenceRequest, held: list[bytes]) -> bool:
    if ended.forsaken:
        return False
    if len(tokens.ids_of(held)) > ended.end.count:
        return False  # it got further elsewhere, whatever the end was here
    if ended.transcript is None:
        # Nobody can say any more whether it is the answer that this client has a part of. (One that failed, or was
        # cancelled by somebody, is not tried again.)
        return ended.end.reason not in ("stop", "length", "deadline")
    return fits(ended, held)


def _all_his(state: State, client: ClientEntry, sessions: dict[bytes, None] | set[bytes]) -> bool:
    """Whether nobody follows it but sessions of this very client, from before."""
    others = [state.registry.clients[session] for session in sessions if session in state.registry.clients]
    return all(other is client or other.is_same(client) for other in others)
