"""Tokens: from the worker into the transcript, and on to whoever follows.

    in order    append, then forward                         (the path that has to be fast)
    overlap     trim to what is new, then as above
    older       drop: it came twice
    gap         keep it aside for a moment; if the gap stays, ask the worker to send it again
    stale       under a key that is no current dispatch: drop, whoever sent it

A client that misses something asks the same of the broker, and is served from the transcript.
"""

from __future__ import annotations

from llambo.broker.actions import Publish, ToClient, ToWorker
from llambo.broker.records.registry import ClientEntry, WorkerEntry
from llambo.broker.records.request import Request, RequestState
from llambo.broker.records.state import State
from llambo.broker.records.transcript import Transcript
from llambo.broker.requests import ending, suspicion
from llambo.mesh.wire import limits, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.stream import Stash

_HEAD = tokens.head
_KEY_END = tokens.KEY_END
_HEAD_BYTES = tokens.HEAD_BYTES
_CHUNK_TOKENS = limits.CHUNK_TOKENS
_FINAL_FLAGS = tokens.FINAL | tokens.STOPPED
_decode_body = tokens.decode_body
_UNDECODABLE = tokens.UNDECODABLE


def tokens_arrived(state: State, frames: list[bytes], now_ms: int) -> None:
    """A drained batch at once: an event for each chunk would cost more than all the rest.

    What is malformed is dropped here, so that whoever reads a transcript later need not ask.
    """
    running = state.running
    out: list[bytes] = []
    for frame in frames:
        request = running.get(frame[1:_KEY_END])
        if request is None or len(frame) <= _HEAD_BYTES:
            _not_running(state, frame)
            continue
        first, count, flags = _HEAD(frame, _KEY_END)
        try:
            body = _decode_body(frame[_HEAD_BYTES:])
        except _UNDECODABLE:
            state.counters.malformed_frames += 1
            continue
        if (
            len(body.ids) != count
            or len(body.pieces) != count
            or not 0 < count <= _CHUNK_TOKENS
            or (body.logprobs is not None and len(body.logprobs) != count)
        ):
            state.counters.malformed_frames += 1
            continue
        transcript = request.transcript
        if first != transcript.next_index or request.stash is not None:
            _irregular(state, request, frame, out, now_ms)
            continue
        # Append before forward: nobody may have seen a token that a continuation would not know.
        transcript.chunks.append(frame)
        transcript.next_index = first + count
        transcript.size += len(frame)
        if flags:
            transcript.final |= flags & _FINAL_FLAGS
        for topic in request.topics:
            out.append(topic + frame)
        if request.watched or transcript.size > transcript.reserved:
            _settle(state, request, now_ms)
    state.counters.chunks += len(frames)
    if out:
        state.out.append(Publish(out))


def _not_running(state: State, frame: bytes) -> None:
    beat = tokens.decode_beat(frame)
    if beat is not None:
        number, session = beat
        worker = state.registry.workers.get(session)
        if worker is not None:
            token_beat(state, worker, number)
    elif frame[:1] == tokens.CHUNK and len(frame) > _HEAD_BYTES:
        state.counters.stale_chunks += 1
    else:
        state.counters.malformed_frames += 1


def token_beat(state: State, worker: WorkerEntry, number: int) -> None:
    """Its token plane works. The first time, tell it so at once: it waits for this to be ready."""
    was_up = worker.tokens_up
    worker.echo = max(worker.echo, number)
    worker.beat = max(worker.beat, number)
    if not was_up:
        heartbeat_worker(state, worker)
        state.touch(worker)


def heartbeat_worker(state: State, worker: WorkerEntry) -> None:
    worker.number += 1
    worker.seq += 1
    beat = m.BrokerHeartbeat(worker.number, worker.echo, seq=worker.seq)
    state.out.append(ToWorker(worker.route, worker.session, beat))


def _irregular(state: State, request: Request, frame: bytes, out: list[bytes], now_ms: int) -> None:
    """Anything but the plain next chunk."""
    first, count, _ = _HEAD(frame, _KEY_END)
    have = request.transcript.next_index
    if first + count > limits.TOKEN_INDEX:
        state.counters.malformed_frames += 1
    elif first + count <= have:
        state.counters.duplicate_chunks += 1
    elif first > have:
        _keep_aside(state, request, first, count, frame, now_ms)
    else:
        _append(state, request, frame, out)
        while request.stash and (later := request.stash.pop_next(request.transcript.next_index)):
            _append(state, request, later, out)
        _settle(state, request, now_ms)


def _append(state: State, request: Request, frame: bytes, out: list[bytes]) -> None:
    first, count, flags = _HEAD(frame, _KEY_END)
    transcript = request.transcript
    if first < transcript.next_index:
        trimmed = tokens.trim_chunk(frame, transcript.next_index)
        if trimmed is None:
            state.counters.malformed_frames += 1
            return
        frame = trimmed
    transcript.chunks.append(frame)
    transcript.next_index = first + count
    transcript.size += len(frame)
    transcript.final |= flags & _FINAL_FLAGS
    out.extend(topic + frame for topic in request.topics)


def _keep_aside(state: State, request: Request, first: int, count: int, frame: bytes, now_ms: int) -> None:
    if request.stash is None:
        request.stash = Stash()
        state.counters.gaps += 1
    request.stash.put(first, count, frame)
    want(state, request, first + count, now_ms)


def _settle(state: State, request: Request, now_ms: int) -> None:
    """After an append that was not plain: is a gap closed, is it timed, complete, too much, is a suspect cleared?"""
    if not request.stash:
        request.stash = None
    if request.awaited or request.heard_at >= 0:
        state.meter.heard(request, now_ms)
    if 0 <= request.suspect_at < request.transcript.next_index:
        suspicion.clear(state, request, now_ms)
    if request.transcript.size > request.transcript.reserved:
        text = f"worker {request.blame} sent more bytes than {request.max_tokens} tokens may take"
        ending.finish(state, request, "error", now_ms, ErrorInfo(Code.ENGINE_FAILED, text))
    elif request.end is not None and request.transcript.next_index >= request.end.count:
        ending.complete(state, request, request.end, now_ms)


# --- what is missing from a worker -------------------------------------------------------------------


def want(state: State, request: Request, until: int, now_ms: int) -> None:
    """The worker has tokens up to `until`. If they do not come by themselves in a moment, ask for them."""
    request.wanted = max(request.wanted, until)
    if request.missing and not request.repair_due:
        request.repair_due = now_ms + state.config.tail_grace_ms
        state.alarm(request.repair_due, "repair", request.id)


def repair(state: State, request: Request, now_ms: int) -> None:
    """An alarm rang: ask once for all that is missing, and again if no answer comes."""
    if not request.repair_due or now_ms < request.repair_due:
        return
    request.repair_due = 0
    worker = request.worker
    if not request.missing or worker is None:
        return
    request.repair_due = now_ms + state.config.resend_ms
    state.alarm(request.repair_due, "repair", request.id)
    _ask(state, request, worker, now_ms)


def _ask(state: State, request: Request, worker: WorkerEntry, now_ms: int) -> None:
    first = request.transcript.next_index
    until = request.stash.first_index if request.stash else 0
    if not request.asked_ms:
        state.counters.repaired += 1
        request.note(now_ms, "repair", f"asked {worker.name} for tokens from {first}")
    request.asked_ms = now_ms
    state.counters.replays_asked += 1
    replay = m.Replay(request.id, first, until, request.dispatch)
    state.out.append(ToWorker(worker.route, worker.session, replay))


def page_arrived(state: State, worker: WorkerEntry, page: m.Page, now_ms: int) -> None:
    """A worker's answer to a replay: chunks like any others. Whatever is still missing is pulled at once."""
    request = state.running.get(page.id + page.dispatch)
    if request is None or request.worker is not worker:
        return
    before = request.transcript.next_index
    if any(chunk[1:_KEY_END] != request.key or tokens.decode_chunk(chunk) is None for chunk in page.chunks):
        # Frames on the token plane may be anyone's; this is its own word, and asking again will not mend it.
        text = f"worker {worker.name} sent a page that is malformed"
        ending.finish(state, request, "error", now_ms, ErrorInfo(Code.ENGINE_FAILED, text))
        return
    tokens_arrived(state, page.chunks, now_ms)
    if request.state is RequestState.ENDED:
        return
    want(state, request, page.total, now_ms)
    if request.missing and request.transcript.next_index > before:
        request.repair_due = now_ms
        repair(state, request, now_ms)
    elif not request.missing:
        request.repair_due = 0


def end_arrived(state: State, worker: WorkerEntry, end: m.End, now_ms: int) -> None:
    """A worker is done. It keeps the tokens until it is told that all of them are here."""
    key = end.id + end.dispatch
    request = state.running.get(key)
    if request is None or request.worker is not worker:
        worker.claims.pop(key, None)
        state.touch(worker)
        ending.acknowledge(state, worker, key)
        return
    if request.end is None:
        request.end, request.watched = end, True
        request.note(now_ms, "worker done", f"{end.count} tokens, {end.reason}")
    if request.transcript.next_index >= end.count:
        ending.complete(state, request, end, now_ms)
        return
    if request.state is not RequestState.COMPLETING:
        request.step(RequestState.COMPLETING)
    want(state, request, end.count, now_ms)


# --- what is missing at a client ---------------------------------------------------------------------


def replay_asked(state: State, client: ClientEntry, asked: m.Replay, now_ms: int) -> None:
    transcript = _transcript(state, asked.id)
    if transcript is None:
        gone = state.archive.get(asked.id)
        code = Code.EXPIRED if gone else Code.UNKNOWN_REQUEST
        text = f"the tokens of request {asked.id.hex()} are not kept here"
        state.out.append(ToClient(client.route, client.session, m.Problem(ErrorInfo(code, text), asked.id)))
        return
    state.counters.replays_served += 1
    send_page(state, client, asked)


def send_page(state: State, client: ClientEntry, asked: m.Replay) -> None:
    transcript = _transcript(state, asked.id)
    if transcript is not None and state.hears(client):
        chunks, after = transcript.page(asked.first, asked.until)
        page = m.Page(asked.id, asked.first, max(after, asked.first), transcript.next_index, chunks)
        state.out.append(ToClient(client.route, client.session, page))


def _transcript(state: State, id: bytes) -> Transcript | None:
    """What a client may have of it. Of a result that is not whole that is nothing: it may yet be begun again."""
    request = state.requests.get(id)
    if request is not None:
        return request.transcript if request.task == "generate" else Transcript(0)
    ended = state.archive.get(id)
    return ended.transcript if ended else None
