"""Tokens: from the worker into the transcript, and on to the clients that follow.

    in order    append, then forward                         (the path that has to be fast)
    overlap     trim to what is new, then as above
    older       drop: it came twice
    gap         put it aside for a moment; if the gap stays, ask the worker to send it again
    stale       under a key that is no current dispatch: drop it

A client that misses something asks the broker in the same way, and is served from the transcript (following.py).
"""

from __future__ import annotations

from llambo.broker.events import Publish
from llambo.broker.records.registry import WorkerEntry
from llambo.broker.records.request import Request, RequestState
from llambo.broker.records.state import State
from llambo.broker.requests import ending, suspicion
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import tokens
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.stream import Fit

_CHUNK = tokens.CHUNK
_HEAD = tokens.head
_open_chunk = tokens.open_chunk
_KEY_END = tokens.KEY_END
_HEAD_BYTES = tokens.HEAD_BYTES
_FINAL_FLAGS = tokens.FINAL | tokens.STOPPED
_decode_body = tokens.decode_body
_UNDECODABLE = tokens.UNDECODABLE
_fits = tokens.fits


def tokens_arrived(state: State, frames: list[bytes], now_ms: int) -> None:
    """A drained batch at once: an event for each chunk would cost more than all the rest.

    What is malformed is dropped here, so that a transcript can be read without checks.
    """
    running = state.running
    out: list[bytes] = []
    for frame in frames:
        if len(frame) <= _HEAD_BYTES:
            _not_running(state, frame)
            continue
        kind, key, first, count, flags = _open_chunk(frame)
        request = running.get(key)
        if request is None or kind != _CHUNK:
            _not_running(state, frame)
            continue
        try:
            body = _decode_body(frame[_HEAD_BYTES:])
        except _UNDECODABLE:
            state.counters.tokens.malformed_frames += 1
            continue
        # Most chunks are one token without logprobs: for these the check is written out.
        if not (count == 1 == len(body.ids) == len(body.pieces) and body.logprobs is None) and not _fits(body, count):
            state.counters.tokens.malformed_frames += 1
            continue
        transcript = request.transcript
        if first != transcript.next_index:
            _irregular(state, request, frame, out, now_ms)
            continue
        # Append before forward: no client may have a token that a continuation would not know.
        transcript.chunks.append(frame)
        transcript.next_index = first + count
        transcript.size += len(frame)
        if flags:
            transcript.final |= flags & _FINAL_FLAGS
        for topic in request.followers.topics:
            out.append(topic + frame)
        if request.watched or transcript.size > transcript.reserved:
            _settle(state, request, out, now_ms)
    state.counters.tokens.chunks += len(frames)
    if out:
        state.out.append(Publish(out))


def _not_running(state: State, frame: bytes) -> None:
    beat = tokens.decode_beat(frame)
    if beat is not None:
        number, session = beat
        worker = state.registry.workers.get(session)
        if worker is not None:
            _token_beat(state, worker, number)
    elif frame[:1] == tokens.CHUNK and len(frame) > _HEAD_BYTES:
        state.counters.tokens.stale_chunks += 1
    else:
        state.counters.tokens.malformed_frames += 1


def _token_beat(state: State, worker: WorkerEntry, number: int) -> None:
    """Its token plane works. The first time it is answered at once: the worker waits for this to be ready.

    Beats of workers are handled here and not in membership.py, because they come among the chunks.
    """
    was_up, beats = worker.tokens_up, worker.beats
    beats.echo = max(beats.echo, number)
    beats.beat = max(beats.beat, number)
    if not was_up:
        heartbeat_worker(state, worker)
        state.pools.touch(worker)


def heartbeat_worker(state: State, worker: WorkerEntry) -> None:
    beats, pace = worker.beats, state.pace
    beats.number += 1
    beats.seq += 1
    message = m.BrokerHeartbeat(beats.number, beats.echo, seq=beats.seq)
    if worker.hello.paced:
        message = m.BrokerHeartbeat(
            beats.number,
            beats.echo,
            seq=beats.seq,
            heartbeat_ms=pace.beat_ms,
            idle_ms=worker.link.idle_ms,
            busy=bool(worker.claims),
        )
    state.to_worker(worker, message)


def _irregular(state: State, request: Request, frame: bytes, out: list[bytes], now_ms: int) -> None:
    """Anything but the plain next chunk."""
    first, count, _ = _HEAD(frame, _KEY_END)
    transcript, counters = request.transcript, state.counters.tokens
    match transcript.fit(first, count):
        case Fit.NEXT:
            _append(state, request, frame, out)
            _settle(state, request, out, now_ms)
        case Fit.EARLY:
            counters.gaps += not transcript.stash
            transcript.put_aside(first, count, frame)
            request.watched = True
            repair_until(state, request, first + count, now_ms)
        case Fit.OLD:
            counters.duplicate_chunks += 1
        case Fit.IMPOSSIBLE:
            counters.malformed_frames += 1


def _append(state: State, request: Request, frame: bytes, out: list[bytes]) -> None:
    transcript = request.transcript
    new = transcript.trimmed(frame)
    if new is None:
        state.counters.tokens.malformed_frames += 1
        return
    first, count, flags = _HEAD(new, _KEY_END)
    transcript.chunks.append(new)
    transcript.next_index = first + count
    transcript.size += len(new)
    transcript.final |= flags & _FINAL_FLAGS
    out.extend(topic + new for topic in request.followers.topics)


def _settle(state: State, request: Request, out: list[bytes], now_ms: int) -> None:
    """After an append that may have consequences, in this order: chunks of the stash continue it; its pauses are timed;
    a suspect is cleared; it is ended because it has too many bytes, or because it is complete.
    """
    transcript = request.transcript
    if transcript.stash is not None:
        for later in transcript.released():
            _append(state, request, later, out)
        request.update_watched()
    if request.measured.first_awaited and transcript.next_index:
        request.note(now_ms, "first token", f"from {request.run.worker_name}")
    if request.measured.first_awaited or request.measured.timed_at >= 0:
        state.measured.meter.chunk_arrived(request, now_ms)
    if 0 <= request.suspicion.token < transcript.next_index:
        suspicion.clear(state, request, now_ms)
    if transcript.size > transcript.reserved:
        text = f"worker {request.run.worker_name} sent more bytes than {request.asked.max_tokens} tokens may take"
        ending.finish(state, request, "error", now_ms, ErrorInfo(Code.ENGINE_FAILED, text))
    elif request.run.end is not None and transcript.next_index >= request.run.end.count:
        ending.complete(state, request, request.run.end, now_ms)


def _cost(usage: m.Usage) -> str:
    """Where the time of the last run went. An engine that does not report it sends zeros."""
    if not usage.prompt_tokens:
        return ""
    prompt = f"prompt of {usage.prompt_tokens} tokens, {usage.cached_tokens} cached"
    return f"; {prompt}, prefill {usage.prefill_ms / 1000:.3f} s, decode {usage.decode_ms / 1000:.3f} s"


# --- what is missing from a worker ---


def repair_until(state: State, request: Request, until: int, now_ms: int) -> None:
    """The worker has tokens up to `until`. If they do not come by themselves in a moment, ask for them."""
    repair = request.repair
    repair.wanted = max(repair.wanted, until)
    if request.incomplete and not repair.due:
        repair.due = now_ms + state.config.timing.tail_grace_ms
        state.set_alarm(request, "repair", repair.due)


def request_replay(state: State, request: Request, now_ms: int) -> None:
    """Ask the worker for the first gap (without a stash: for all that follows), and again if no answer comes."""
    repair, worker = request.repair, request.run.worker
    if not repair.due or now_ms < repair.due:
        return
    repair.due = 0
    if not request.incomplete or worker is None:
        return
    repair.due = now_ms + state.config.timing.resend_ms
    state.set_alarm(request, "repair", repair.due)
    transcript = request.transcript
    if not repair.asked:
        repair.asked = True
        state.counters.tokens.repaired += 1
        request.note(now_ms, "repair", f"asked {worker.name} for tokens from {transcript.next_index}")
    state.counters.tokens.replays_asked += 1
    until = transcript.stash.first_index if transcript.stash else 0
    state.to_worker(worker, m.Replay(request.id, transcript.next_index, until, request.run.dispatch))


def page_arrived(state: State, worker: WorkerEntry, page: m.Page, blob: bytes, now_ms: int) -> None:
    """A worker's answer to a replay: chunks like any others. What is still missing is asked for at once."""
    request = state.running.get(page.id + page.dispatch)
    if request is None or request.run.worker is not worker:
        return
    before = request.transcript.next_index
    if any(chunk[1:_KEY_END] != request.run.key or tokens.decode_chunk(chunk) is None for chunk in page.chunks):
        # A frame on the token plane may be forged; a page is from the worker itself, and asking again is no help.
        text = f"worker {worker.name} sent a page that is malformed"
        ending.finish(state, request, "error", now_ms, ErrorInfo(Code.ENGINE_FAILED, text))
        return
    tokens_arrived(state, page.chunks, now_ms)
    if request.state is RequestState.ENDED:
        return
    repair_until(state, request, page.total, now_ms)
    if request.incomplete and request.transcript.next_index > before:
        request.repair.due = now_ms
        request_replay(state, request, now_ms)
    elif not request.incomplete:
        request.repair.due = 0


def end_arrived(state: State, worker: WorkerEntry, end: m.End, blob: bytes, now_ms: int) -> None:
    """A worker is done. It holds the tokens until the broker acknowledges that all of them are here.

    An END under a key that is not in the fence is only acknowledged, so that the worker stops sending it.
    """
    key = end.id + end.dispatch
    if key == worker.backlog.receipt:
        if worker.backlog.confirm():
            state.ask_worker(worker)
        state.pools.touch(worker)
        return
    request = state.running.get(key)
    if request is None or request.run.worker is not worker:
        worker.claims.pop(key, None)
        state.pools.touch(worker)
        ending.acknowledge(state, worker, key)
        return
    if request.run.end is None:
        request.run.end, request.watched = end, True
        request.note(now_ms, "worker done", f"{end.count} tokens, {end.reason}{_cost(end.usage)}")
    if request.transcript.next_index >= end.count:
        ending.complete(state, request, end, now_ms)
        return
    if request.state is not RequestState.COMPLETING:
        request.step(RequestState.COMPLETING)
    repair_until(state, request, end.count, now_ms)
