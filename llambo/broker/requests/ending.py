"""How a request ends: once, by the broker alone, and so that its client is sure to learn of it."""

from __future__ import annotations

from llambo.broker.records.archive import EndedRequest
from llambo.broker.records.journal import LogLine
from llambo.broker.records.registry import ClientEntry, WorkerEntry
from llambo.broker.records.request import Request, RequestState
from llambo.broker.records.state import State
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo


def complete(state: State, request: Request, end: m.End, now_ms: int) -> None:
    """The worker is done and every token is here: now it may drop them.

    Here means in this broker's memory; clients may not have them yet. Those that they have not are made again if this
    broker is lost now. An END with an error is final as well: it is not tried elsewhere, as a refusal would be.
    """
    worker = request.run.worker
    assert worker is not None, "only a dispatched request is completed"
    worker.claims.pop(request.run.key, None)
    worker.done += 1
    acknowledge(state, worker, request.run.key)
    error = end.error
    if error is None:
        state.models.retries.earn(request.model, request.run.refusals)
    if end.reason == "deadline" and error is None:  # the engine saw it first
        error = _deadline_error(request, now_ms)
    _close(state, request, end.reason, now_ms, error=error, usage=end.usage, stop=end.stop)


def finish(state: State, request: Request, reason: m.Reason, now_ms: int, error: ErrorInfo | None = None) -> None:
    """The broker ends it by itself. A worker that runs it is to stop; its slot counts until it has."""
    cancel_run(state, request)
    _close(state, request, reason, now_ms, error=error)


def forget(state: State, request: Request, now_ms: int) -> None:
    """As if it had never been here: only the worker gets a message."""
    cancel_run(state, request)
    _remove(state, request, now_ms)
    for client in _followers(state, request):
        client.following.pop(request.id, None)
    _free_worker(state, request)


def deadline_passed(state: State, request: Request, now_ms: int) -> None:
    finish(state, request, "deadline", now_ms, _deadline_error(request, now_ms))


def _deadline_error(request: Request, now_ms: int) -> ErrorInfo:
    return ErrorInfo(Code.DEADLINE, f"not done {now_ms - request.submitted_at} ms after it was asked")


def announce_model(state: State, request: Request) -> None:
    """Its followers learn which model it is from: they have to know it should this broker be gone."""
    for client in _followers(state, request):
        state.to_client(client, m.Accepted(request.id, 0, request.model, request.run.fingerprint, request.proof))


def acknowledge(state: State, worker: WorkerEntry, key: bytes) -> None:
    """Nothing of this dispatch is needed from the worker any more."""
    state.to_worker(worker, m.EndAck([key]))


def _followers(state: State, request: Request) -> list[ClientEntry]:
    clients = state.registry.clients
    return [client for session in request.followers if (client := clients.get(session)) is not None]


def cancel_run(state: State, request: Request) -> None:
    worker, run = request.run.worker, request.run
    if worker is not None and run.key in worker.claims:
        state.to_worker(worker, m.Cancel(request.id, run.dispatch))


def _free_worker(state: State, request: Request) -> None:
    if request.run.worker is not None:
        state.pools.touch(request.run.worker)
    request.run.worker = None


def _remove(state: State, request: Request, now_ms: int) -> None:
    waiting = request.state is RequestState.WAITING
    state.measured.meter.left(request)
    request.step(RequestState.ENDED)
    if waiting:
        state.queue.left(request)
        request.place.queued_ms += now_ms - request.place.queued_at
    state.clear_alarms(request)
    state.release(request)


def _close(
    state: State,
    request: Request,
    reason: m.Reason,
    now_ms: int,
    *,
    error: ErrorInfo | None,
    usage: m.Usage = m.Usage(),  # noqa: B008  # it is immutable
    stop: str = "",
) -> None:
    _remove(state, request, now_ms)
    transcript, run = request.transcript, request.run
    if request.task != "generate" and reason != "stop":
        transcript.clear()  # whole or nothing
    state.counters.requests.ended += 1
    state.counters.requests.failed += error is not None
    state.measured.meter.ended(request, reason, error, usage, now_ms)
    if request.task == "generate":
        state.counters.tokens.tokens += transcript.next_index
        request.account.tokens += transcript.next_index
    request.note(now_ms, "ended", f"{transcript.next_index} tokens, {reason}{': ' + error.text if error else ''}")
    end = m.End(
        request.id,
        transcript.next_index,  # what clients can get, which may differ from what the worker's END says
        reason,
        usage=usage,
        worker=run.worker_name,
        error=error,
        moves=run.moves,
        queued_ms=request.place.queued_ms,
        stop=stop,
    )
    if error is not None:
        worker = run.worker.name if run.worker is not None else ""
        # Only its code: a text may quote the prompt.
        state.journal.log.append(LogLine(f"request failed: {error.code.value}", worker=worker, request=request.id))
    ended = state.archive.add(request, end, now_ms)
    for client in _followers(state, request):
        client.following.pop(request.id, None)
        send_end(state, client, ended, 0, now_ms, with_page=not ended.stream)
    _free_worker(state, request)


def send_end(
    state: State, client: ClientEntry, ended: EndedRequest, have: int, now_ms: int, *, with_page: bool
) -> None:
    """Send the END, and to those who had no stream the first page of the answer with it."""
    client.unacked.pop(ended.end.id, None)
    client.unacked[ended.end.id] = now_ms
    state.to_client(client, ended.end)
    if with_page and state.may_push_to(client) and ended.transcript is not None and have < ended.end.count:
        chunks, after = ended.transcript.page(have, 0)
        state.to_client(client, m.Page(ended.end.id, have, after, ended.end.count, chunks))
