"""What happens when a broker is restarted, or a client comes from another one.

What a broker knows dies with it, but nothing is lost: the client has its prompt and the tokens it was given, the
worker has the prompt and all tokens, and goes on making more. Both come to the next broker, in any order.

    client                               broker                               worker
      | --- submit, resume ------------->|                                      |      "I had this, and hold these"
      |        it knows the model        | AWAITING_RUN, for `adopt_ms`         |
      |        or not yet                | deferred, for `startup_grace_ms`     |
      |                                  |<------------------------- orphan --- |      "I run this, without a broker"
      |                                  | an orphan run, for `orphan_ms`       |

                 both are here, and the run continues what the client holds
                                             |
             +-------------------------------+------------------------------+
             | yes                                                          | no, within `adopt_ms`
      ADOPTED: the run goes on as if it had              DISPATCHED: another run continues after the tokens
      been dispatched here; other runs of the            that the client holds; other runs of the request
      request are cancelled                              are cancelled

In either case what a client was given never changes. Of several runs that fit, the latest attempt is adopted. A run
that was meant to go on without its client (detached) is adopted by itself, or when a client attaches to it.

With keys a worker is believed only what a broker has sealed (records/seals.py): that this run, with this prompt and
these options, was given to it for this owner. What it makes up, or took from another worker, is stopped.

A worker that this broker had given up announces its runs in the same way when it is back. If the request still waits
for a worker, its run is adopted under the key it had, which so gets into the fence again.

After a restart refusals are deferred: the worker that serves the model, or the one that has the run, may be on its way.
Each time something new is known, deferred messages are tried again (`admission.retry_deferred`).
"""

from __future__ import annotations

from collections.abc import Iterable

from llambo.broker.access import permissions
from llambo.broker.records import seals
from llambo.broker.records.accounts import ELSEWHERE
from llambo.broker.records.archive import EndedRequest
from llambo.broker.records.orphans import Deferred, OrphanRun
from llambo.broker.records.registry import ClientEntry, WorkerEntry
from llambo.broker.records.request import Request, RequestState
from llambo.broker.records.state import State
from llambo.broker.requests import delivery, dispatching, ending, model_names, refusals
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import tokens, transfer
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.identity import Identity

#: So long after the start of a broker its workers are back, and their detached runs are taken in without a client.
COMING_HOME_MS = 60_000

# --- A worker announces a run without a broker. ---


def place_orphan(state: State, worker: WorkerEntry, orphaned: m.Orphan, blob: bytes, now_ms: int) -> None:
    """Adopt it, store it, or stop it. Its broker is gone; that may have been this one before a restart, or this one
    itself, which has given the worker up.
    """
    work, orphans = orphaned.work, state.recovery.orphans
    try:
        prompt, chunks = transfer.unpack(blob, work.prompt_bytes)
        _check(state, worker, work, prompt)
    except ValueError as error:
        state.journal.add(now_ms, "bad orphan", f"{worker.name}: {error}", warning=True, worker=worker.name)
        _stop(state, worker, work)
        return
    request = state.requests.get(work.id)
    known = request or state.archive.get(work.id)
    if known is not None and known.owner != work.owner:
        return  # not of the request that has this id here
    due = now_ms + state.config.timing.orphan_ms
    orphan = OrphanRun(worker, work, prompt, [_with_key(chunk, work) for chunk in chunks], due)
    if request is not None:
        if request.state is RequestState.WAITING and _continues(request, orphan):
            _adopt(state, request, orphan, now_ms)
        elif request.run.key == orphan.key and request.run.worker is worker:
            _send_adopt(state, orphan)  # announced twice, and adopted the first time
        else:
            _stop(state, worker, work)
    elif known or state.held_bytes + orphans.bytes + orphan.size > state.config.bounds.transcript_bytes:
        _stop(state, worker, work)
    else:
        orphans.add(orphan)
        waiting = _deferred_attach(state, work)
        if waiting is not None or (orphaned.home and _may_be_home(state, now_ms)):
            _take_detached(state, work.owner, waiting or m.Attach(work.id), now_ms)


def _may_be_home(state: State, now_ms: int) -> bool:
    """Whether this broker may have dispatched it in a former life. A seal has no age, and `home` is the worker's word.

    Without keys there is nothing to protect.
    """
    started_at = state.wakeups.started_at
    return not state.config.marks_key or started_at < 0 or now_ms - started_at < COMING_HOME_MS


def _check(state: State, worker: WorkerEntry, work: m.Dispatch, prompt: bytes) -> None:
    """Whether this worker may run this. Raises ValueError."""
    if work.model not in worker.serving.models:
        raise ValueError(f"a run of the model {work.model!r}, which it does not serve")
    key = state.config.marks_key
    if key and not seals.is_sealed(key, work, prompt, worker.name):
        permissions.count_forbidden(state, worker.link.identity)
        raise ValueError("a run without the seal of a broker for it")


def _deferred_attach(state: State, work: m.Dispatch) -> m.Attach | None:
    for (_, id), deferred in state.recovery.deferred.items():
        if id == work.id and isinstance(deferred.message, m.Attach) and deferred.client.identity.owns(work.owner):
            return deferred.message
    return None


# --- A client resumes a request that this broker does not know. ---


def resume(state: State, request: Request, now_ms: int) -> None:
    """It waits apart until its run is announced, or is not."""
    request.place.awaiting_run = True
    state.queue.put(request, now_ms)
    if request.transcript.next_index:
        request.note(now_ms, "resumed", f"its client holds {request.transcript.next_index} tokens")
    if dispatching.finish_complete(state, request, now_ms):
        _stop_others(state, request, b"")
        return
    if not _adopt_latest(state, request, now_ms):
        state.set_alarm(request, "adopt", now_ms + state.config.timing.adopt_ms)


def look_for(state: State, who: Identity, asked: m.Attach, now_ms: int) -> None:
    """A client wants to follow it. Adopt a detached run of it, which does not need its own client for that."""
    for owner in state.recovery.orphans.owners(asked.id):
        if who.owns(owner):
            _take_detached(state, owner, asked, now_ms)


def _take_detached(state: State, owner: str, asked: m.Attach, now_ms: int) -> None:
    orphans = state.recovery.orphans
    if asked.id in state.requests or state.archive.get(asked.id):
        return
    given = tokens.ids_of(asked.held)
    found = orphans.take(asked.id, owner)
    fitting = [o for o in found if o.work.detached and _goes_on(o, asked.fingerprint if given else "", given)]
    adopted = fitting[0] if fitting and _admit_detached(state, fitting[0], now_ms) else None
    for orphan in found:
        if adopted is None:
            orphans.add(orphan)
        elif orphan is not adopted:
            _stop(state, orphan.worker, orphan.work)


def dispatch_instead(state: State, request: Request, now_ms: int) -> None:
    """No worker has announced it in time. Another run goes on from here."""
    if request.place.awaiting_run and request.state is RequestState.WAITING:
        _stop_others(state, request, b"")
        state.queue.left(request)
        request.place.awaiting_run = False
        request.place.queued_ms += now_ms - request.place.queued_at
        request.note(now_ms, "not adopted", "no worker announced it; it goes on elsewhere")
        dispatching.enqueue(state, request, now_ms)


def agrees(request: Request, held: list[bytes], fingerprint: str) -> bool:
    """Whether the tokens of this client are those of the others. A request that awaits its run may learn from it.

    Those of two files may be the same so far, and are not the same answer.

    It then has the chunks as the client sent them. That they carry this request's id is not checked: clients that were
    sent others would drop them. (`admission._admit` writes it into those of a submit.)
    """
    ours, theirs = request.transcript.ids(), tokens.ids_of(held)
    if ours and theirs and _differ(request.run.fingerprint, fingerprint):
        return False
    if len(theirs) > len(ours) and request.place.awaiting_run and theirs[: len(ours)] == ours:
        request.transcript.restore(held)
        request.run.fingerprint = fingerprint or request.run.fingerprint
        return True
    return ours[: len(theirs)] == theirs


def _differ(ours: str, theirs: str) -> bool:
    """Two files, as far as is known: a peer of an older version does not say which file its tokens are of."""
    return bool(ours and theirs) and ours != theirs


def accepts(state: State, request: Request, asked: m.Attach, now_ms: int) -> bool:
    """Whether this client may follow it with the tokens it holds.

    If it got further at another broker, the request goes on here after its tokens: of those that other clients have
    none changes.
    """
    held, run = asked.held, request.run
    if agrees(request, held, asked.fingerprint):
        return True
    ours = request.transcript.ids()
    differ = _differ(run.fingerprint, asked.fingerprint)
    if request.task != "generate" or tokens.ids_of(held)[: len(ours)] != ours or (ours and differ):
        return False
    state.measured.meter.count(request)
    waits = request.state is RequestState.WAITING
    if waits:
        state.queue.left(request)  # its lane follows from its tokens
        request.place.queued_ms += now_ms - request.place.queued_at
    else:
        ending.cancel_run(state, request)
    request.transcript.restore(held)
    request.measured.counted = request.transcript.next_index
    run.fingerprint = asked.fingerprint or run.fingerprint
    if differ:
        ending.announce_model(state, request)
    if waits:
        state.queue.put(request, now_ms)
        if not dispatching.finish_complete(state, request, now_ms) and not request.place.awaiting_run:
            state.open_lane(request.lane)
            dispatching.pump(state, request.lane, now_ms)
    else:
        dispatching.requeue(state, request, "a client got further at another broker", now_ms, what="moved")
    return True


def _adopt_latest(state: State, request: Request, now_ms: int) -> bool:
    found = False
    for orphan in state.recovery.orphans.take(request.id, request.owner):
        if not found and _continues(request, orphan):
            found = True
            _adopt(state, request, orphan, now_ms)
        elif not found and _has_fewer(request, orphan):
            state.recovery.orphans.add(orphan)
        else:
            _stop(state, orphan.worker, orphan.work)
    return found


def _has_fewer(request: Request, orphan: OrphanRun) -> bool:
    """The announcement has fewer tokens than its client got later, through another broker that adopted the run.

    So it is no orphan; or it is one again, and then its worker announces it again, with all it has. We wait for that.
    """
    known, given = tokens.ids_of(orphan.chunks), request.transcript.ids()
    return len(known) < len(given) and given[: len(known)] == known


def _continues(request: Request, orphan: OrphanRun) -> bool:
    """It has the same model, and its tokens begin with those that were given out already."""
    if request.model != orphan.work.model:
        return False
    return _goes_on(orphan, request.run.fingerprint, request.transcript.ids())


def _goes_on(orphan: OrphanRun, fingerprint: str, given: list[int]) -> bool:
    own = orphan.worker.serving.fingerprints.get(orphan.work.model, "")
    return fingerprint in ("", own) and tokens.ids_of(orphan.chunks)[: len(given)] == given


def _adopt(state: State, request: Request, orphan: OrphanRun, now_ms: int) -> None:
    """As if it had been dispatched to that worker just now, except that it runs already."""
    worker, key, work, run = orphan.worker, orphan.key, orphan.work, request.run
    held, before = request.transcript.next_index, run.fingerprint
    request.step(RequestState.DISPATCHED)
    state.queue.left(request)
    request.place.awaiting_run = False
    request.place.queued_ms += now_ms - request.place.queued_at
    run.attempt = max(run.attempt, orphan.attempt)
    run.key, run.worker, run.worker_name = key, worker, worker.name
    run.fingerprint = worker.serving.fingerprints.get(request.model, "")
    state.mark_running(request)
    worker.adopted.add(key)
    suspicion = request.suspicion
    if work.suspect is not None and work.suspect >= held and suspicion.token < 0:
        suspicion.token, suspicion.text = work.suspect, "one before its broker was gone"
    if suspicion.token >= 0:
        request.watched = True
        worker.add_suspect(key, request)
    state.pools.refresh(worker)
    state.counters.requests.adopted += 1
    _stop_others(state, request, key)
    count = transfer.count(orphan.chunks)
    request.note(now_ms, "adopted", f"from {worker.name}, which has {count} tokens; {held} held")
    _send_adopt(state, orphan)
    if run.fingerprint != before:
        ending.announce_model(state, request)
    delivery.tokens_arrived(state, orphan.chunks, now_ms)
    state.measured.meter.adopted(request, worker.hello.node_class)


def _send_adopt(state: State, orphan: OrphanRun) -> None:
    worker = orphan.worker
    worker.beats.seq += 1
    worker.claims[orphan.key] = worker.beats.seq
    state.pools.refresh(worker)
    state.pools.touch(worker)  # it may be one that is to be emptied
    state.to_worker(worker, m.Adopt(orphan.work.id, orphan.work.dispatch, worker.beats.seq))


def _admit_detached(state: State, orphan: OrphanRun, now_ms: int) -> bool:
    """Its own client may not come back for a long time, so the request is made from what the worker has.

    False: its owner may not have that now. The run is then left to its worker, which stops it after `orphan_ms`.
    """
    work = orphan.work
    asked = m.InferenceRequest(
        id=work.id,
        model=work.model,
        max_tokens=work.max_tokens,
        stream=work.stream,
        priority=work.priority,
        deadline_ms=work.deadline_ms,
        detached=True,
        resume=True,
        seed=work.seed,
        sampling=work.sampling,
        logprobs=work.logprobs,
        task=work.task,
    )
    if why := _why_not(state, asked, orphan, now_ms):
        text = f"{orphan.worker.name}, a detached run of {work.owner}: {why}"
        state.journal.add(now_ms, "orphan left", text, warning=True, request=work.id, worker=orphan.worker.name)
        return False
    request = Request(asked, work.model, orphan.prompt, now_ms, state.access.accounts.of(work.owner))
    state.admit(request)
    request.place.awaiting_run = True
    state.queue.put(request, now_ms)
    _adopt(state, request, orphan, now_ms)
    return True


def _why_not(state: State, asked: m.InferenceRequest, orphan: OrphanRun, now_ms: int) -> str:
    """Why its owner may not have it now; empty: it may."""
    owner = orphan.work.owner
    if state.access.identities is not None:
        who = state.access.accounts.allowed(owner)
        if who is None:
            return "there is no key of that name"
        if (forbidden := permissions.not_allowed(state, who, asked, now_ms)) is not None:
            return forbidden[1].text
    account = state.access.accounts.of(owner)
    # Of two brokers each may have let it have as much as it may have here.
    if account.in_flight >= ELSEWHERE * account.max_in_flight:
        return f"{account.in_flight} of its requests are with workers already"
    refused = refusals.limit_reached(state, account, asked, orphan.prompt, [], True, now_ms)
    return refused[1].text if refused is not None else ""


def _stop_others(state: State, request: Request, key: bytes) -> None:
    for orphan in state.recovery.orphans.take(request.id, request.owner):
        if orphan.key != key:
            _stop(state, orphan.worker, orphan.work)


def _stop(state: State, worker: WorkerEntry, work: m.Dispatch) -> None:
    state.to_worker(worker, m.Cancel(work.id, work.dispatch))


def _with_key(chunk: bytes, work: m.Dispatch) -> bytes:
    """Chunks of earlier attempts have other keys, which are not in the fence."""
    return tokens.CHUNK + work.id + work.dispatch + chunk[tokens.KEY_END :]


# --- A client returns that was at another broker. ---
#
# A client follows one broker at a time, and only what that one sends counts. So what this broker knows of a request may
# be out of date. While its client was away the request was cancelled here, since it had no follower; or it went on here
# in one way and there in another. The client has the prompt and every token it was given, so what it holds is right:
# what does not fit is forgotten here, and the request begins again, as one from a broker that is gone. The exception:
# another client follows it here and was given other tokens. Then both cannot be served, and the existing follower wins.


def forget_outdated(
    state: State, client: ClientEntry, asked: m.InferenceRequest, held: list[bytes], now_ms: int
) -> bool:
    """Before a submit is handled: forget what is known of its request, if that is of no use to its client.

    True: the submit is a new one now, with an END of its own.
    """
    request, ended = state.requests.get(asked.id), state.archive.ended.get(asked.id)
    if request is not None and held and not agrees(request, held, asked.fingerprint):
        if _no_other_client(state, client, request.followers):
            ending.forget(state, request, now_ms)
            return True
    elif ended is not None and not _serves(ended, asked, held) and _no_other_client(state, client, ended.owed):
        state.archive.forget(asked.id)
        return True
    return False


def fits(ended: EndedRequest, held: list[bytes], fingerprint: str) -> bool:
    """Whether the answer begins with these tokens."""
    if ended.transcript is None or not held:
        return True
    if _differ(ended.fingerprint, fingerprint):
        return False
    ours, theirs = ended.transcript.ids(), tokens.ids_of(held)
    return ours[: len(theirs)] == theirs


def is_outdated(ended: EndedRequest, have: int) -> bool:
    """Whether this END counts for nothing: for a client that holds `have` tokens of the answer.

    It was cancelled for lack of a follower, which says nothing of how it went on elsewhere; or its client got further
    elsewhere. Neither a submit nor an attach is answered with such an END.
    """
    return ended.abandoned or have > ended.end.count


def _serves(ended: EndedRequest, asked: m.InferenceRequest, held: list[bytes]) -> bool:
    if is_outdated(ended, asked.have):
        return False
    if ended.transcript is None:
        # It cannot be found out any more whether this client has a part of that answer. (One that failed, or was
        # cancelled by a client, is not tried again.)
        return ended.end.reason not in ("stop", "length", "deadline")
    return fits(ended, held, asked.fingerprint)


def _no_other_client(state: State, client: ClientEntry, sessions: Iterable[bytes]) -> bool:
    """Whether all of these sessions are this client's, from before."""
    clients = state.registry.clients
    return all(
        clients[session].is_same(client) or clients[session] is client for session in sessions if session in clients
    )


# --- A client asks for what this broker does not know yet. ---


def defer(state: State, client: ClientEntry, message: m.InferenceRequest | m.Attach, blob: bytes, now_ms: int) -> bool:
    """True: it is handled: deferred, or refused because too many are. False: the broker is old enough to refuse it.

    How many are deferred is bounded, and for how long; their bytes are not.
    """
    key = (client.session, message.id)
    waiting = state.recovery.deferred.get(key)
    began = state.wakeups.started_at if state.wakeups.started_at >= 0 else now_ms
    if isinstance(message, m.Attach) and message.resume:
        began = now_ms  # at any age: it was with another broker, and the peers that know it are on their way
    due = waiting.due if waiting else began + state.config.timing.startup_grace_ms
    if now_ms >= due:
        return False
    if waiting is None and (code := _too_many(state, client.identity, message)) is not None:
        text = "this broker has just begun, and too many wait for its workers"
        refusals.refuse(state, client, message.id, code, text)
    else:
        state.recovery.deferred[key] = Deferred(client, message, blob, due)
    return True


def forget_deferred(state: State, client: ClientEntry, id: bytes) -> None:
    """The client wants nothing of it any more, so it is not tried again."""
    state.recovery.deferred.pop((client.session, id), None)


def _too_many(state: State, who: Identity, message: m.InferenceRequest | m.Attach) -> Code | None:
    """Too many are deferred already: of all clients, or new requests of this identity."""
    deferred = state.recovery.deferred
    if len(deferred) >= state.config.bounds.queue_requests:
        return Code.BUSY
    if not who.max_queued or isinstance(message, m.Attach):
        return None
    # (One that can be proved names its model, and is not deferred.)
    own = [other.message for other in deferred.values() if other.client.identity.name == who.name]
    waiting = sum(isinstance(other, m.InferenceRequest) for other in own)
    return Code.OVER_LIMIT if waiting >= who.max_queued else None


def is_answerable(state: State, who: Identity, message: m.InferenceRequest | m.Attach, now_ms: int) -> bool:
    ended = state.archive.get(message.id)
    if message.id in state.requests or (ended is not None and not is_outdated(ended, message.have)):
        return True
    return isinstance(message, m.InferenceRequest) and model_names.resolve(state, who, message, now_ms)[1] is None
