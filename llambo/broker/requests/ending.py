"""How a request ends: once, by the broker alone, and so that its client is sure to learn of it."""

from __future__ import annotations

from llambo.broker.actions import ToClient, ToWorker
from llambo.broker.records import retry_budget
from llambo.broker.records.archive import Ended
from llambo.broker.records.registry import ClientEntry, WorkerEntry
from llambo.broker.records.request import Request, RequestState
from llambo.broker.records.state import Report, State
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo


def complete(state: State, request: Request, end: m.End, now_ms: int) -> None:
    """The worker is done and every token is here: now it may forget them."""
    worker = request.worker
    assert worker is not None, "only a dispatched request is completed"
    worker.claims.pop(request.key, None)
    worker.done += 1
    acknowledge(state, worker, request.key)
    error = end.error
    if state.budgets and error is None:
        retry_budget.earn(state, request)
    if end.reason == "deadline" and error is None:  # the engine saw it first
        error = ErrorInfo(Code.DEADLINE, f"not done {now_ms - request.submitted_at} ms after it was asked")
    _close(state, request, end.reason, now_ms, error, end.usage, end.stop)
    _freed(state, request)


def finish(state: State, request: Request, reason: m.Reason, now_ms: int, error: ErrorInfo | None = None) -> None:
    """The broker ends it by itself. A worker that runs it is told to stop; its slot counts until it has."""
    worker, key = request.worker, request.key
    if worker is not None and key in worker.claims:
        state.out.append(ToWorker(worker.route, worker.session, m.Cancel(request.id, request.dispatch)))
    _close(state, request, reason, now_ms, error, m.Usage())
    _freed(state, request)


def forget(state: State, request: Request, now_ms: int) -> None:
    """As if it had never been here: nobody is told but the worker."""
    worker, key = request.worker, request.key
    if worker is not None and key in worker.claims:
        state.out.append(ToWorker(worker.route, worker.session, m.Cancel(request.id, request.dispatch)))
    _remove(state, request, now_ms)
    for session in request.followers:
        client = state.registry.clients.get(session)
        if client is not None:
            client.following.pop(request.id, None)
    _freed(state, request)


def confirm(state: State, request: Request) -> None:
    """Its followers learn which model it is from: they will be asked should this broker be gone."""
    for session in request.followers:
        client = state.registry.clients.get(session)
        if client is not None:
            said = m.Accepted(request.id, 0, request.model, request.fingerprint)
            state.out.append(ToClient(client.route, client.session, said))


def acknowledge(state: State, worker: WorkerEntry, key: bytes) -> None:
    """Nothing of this dispatch is needed from the worker any more."""
    state.out.append(ToWorker(worker.route, worker.session, m.EndAck([key])))


def _freed(state: State, request: Request) -> None:
    if request.worker is not None:
        state.touch(request.worker)
    request.worker = None


def _remove(state: State, request: Request, now_ms: int) -> None:
    waiting = request.state is RequestState.WAITING
    state.meter.left(request)
    request.step(RequestState.ENDED)
    if waiting:
        state.room.left(request)
        request.queued_ms += now_ms - request.queued_at
    state.release(request)


def _close(
    state: State, request: Request, reason: m.Reason, now_ms: int, error: ErrorInfo | None, usage: m.Usage,
    stop: str = "",
) -> None:  # fmt: skip
    _remove(state, request, now_ms)
    transcript = request.transcript
    if request.task != "generate" and reason != "stop":
        transcript.clear()  # whole or nothing
    state.counters.ended += 1
    state.counters.failed += error is not None
    state.meter.ended(request, reason, error, usage, now_ms)
    if request.task == "generate":
        state.counters.tokens += transcript.next_index
        request.account.tokens += transcript.next_index
    request.note(now_ms, "ended", f"{transcript.next_index} tokens, {reason}{': ' + error.text if error else ''}")
    end = m.End(
        request.id, transcript.next_index, reason, b"", usage, error, request.blame, request.moves, request.queued_ms,
        stop,
    )  # fmt: skip
    if error is not None:
        worker = request.worker.name if request.worker is not None else ""
        # Only its code: a text may quote what was asked.
        state.reports.append(Report(f"request failed: {error.code.value}", worker=worker, request=request.id))
    ended = state.archive.add(request, end, now_ms)
    for session in request.followers:
        client = state.registry.clients.get(session)
        if client is not None:
            client.following.pop(request.id, None)
            tell(state, client, ended, 0, now_ms, with_page=not ended.stream)


def tell(state: State, client: ClientEntry, ended: Ended, have: int, now_ms: int, *, with_page: bool) -> None:
    """Send the END, and to those who had no stream the first page of the answer with it."""
    client.unacked.pop(ended.end.id, None)
    client.unacked[ended.end.id] = now_ms
    _say_end(state, client, ended)
    if with_page and state.hears(client) and ended.transcript is not None and have < ended.end.count:
        chunks, after = ended.transcript.page(have, 0)
        page = m.Page(ended.end.id, have, after, ended.end.count, chunks)
        state.out.append(ToClient(client.route, client.session, page))


def remind(state: State, client: ClientEntry, now_ms: int) -> None:
    """Send again every END that has gone unacknowledged for too long, the oldest first."""
    late: list[bytes] = []
    for id, sent_at in client.unacked.items():
        if now_ms - sent_at < state.config.resend_ms:
            break
        late.append(id)
    for id in late:
        del client.unacked[id]
        ended = state.archive.get(id)
        if ended is not None:
            client.unacked[id] = now_ms
            _say_end(state, client, ended)


def _say_end(state: State, client: ClientEntry, ended: Ended) -> None:
    state.out.append(ToClient(client.route, client.session, ended.end))
