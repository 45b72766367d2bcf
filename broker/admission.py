"""A client's words: submit, attach, cancel, acknowledge. Everything a client may ask for is decided here."""

from __future__ import annotations

from llambo.broker import delivery, dispatching, ending
from llambo.broker.actions import ToClient
from llambo.broker.registry import ClientEntry
from llambo.broker.requests import Request, RequestState
from llambo.broker.state import State
from llambo.broker.transcript import reservation
from llambo.mesh import limits
from llambo.mesh import messages as m
from llambo.mesh.errors import Code, ErrorInfo

#: Between these a refused client is told to wait.
RETRY_AFTER_MS = (100, 30_000)


def submit(state: State, client: ClientEntry, asked: m.InferenceRequest, prompt: bytes, now_ms: int) -> None:
    """Take a request in, or say why not. The same id again means the same request: its sender joins it."""
    if asked.id in state.requests or state.archive.get(asked.id):
        state.counters.attached += 1
        attach(state, client, m.Attach(asked.id, asked.have), now_ms)
        return
    model, error = _place(state, asked.model)
    error = error or _refusal(state, asked, prompt, now_ms)
    if error is not None:
        state.counters.refused += 1
        state.out.append(ToClient(client.route, client.session, m.Problem(error, asked.id)))
        return
    request = Request(asked, model, prompt, now_ms)
    state.counters.submitted += 1
    state.requests[asked.id] = request
    state.reserved += request.transcript.reserved + len(prompt)
    follow(request, client)
    what = f"at most {asked.max_tokens} tokens" if asked.task == "generate" else asked.task
    request.note(now_ms, "submitted", f"model {model}, {what}, {asked.priority}")
    if request.deadline_at:
        state.alarm(request.deadline_at, "deadline", request.id)
    dispatching.enqueue(state, request, now_ms)
    ahead = state.room.ahead(request) if request.state is RequestState.WAITING else 0
    state.out.append(ToClient(client.route, client.session, m.Accepted(request.id, ahead, model)))


def attach_asked(state: State, client: ClientEntry, asked: m.Attach, now_ms: int) -> None:
    """A result is for whoever asked for it: who only attaches does not know what its bytes mean."""
    there = state.requests.get(asked.id) or state.archive.get(asked.id)
    if there is not None and there.task != "generate":
        _refuse(state, client, asked.id, Code.BAD_REQUEST, f"request {asked.id.hex()} ({there.task}) makes no stream")
        return
    attach(state, client, asked, now_ms)


def attach(state: State, client: ClientEntry, asked: m.Attach, now_ms: int) -> None:
    """Follow a request from token `have` on, live or ended."""
    request = state.requests.get(asked.id)
    if request is not None:
        follow(request, client)
        ahead = state.room.ahead(request) if request.state is RequestState.WAITING else 0
        state.out.append(ToClient(client.route, client.session, m.Accepted(request.id, ahead, request.model)))
        if request.stream and asked.have < request.transcript.next_index:
            delivery.send_page(state, client, m.Replay(asked.id, asked.have))
        return
    ended = state.archive.get(asked.id)
    if ended is None:
        _refuse(state, client, asked.id, Code.UNKNOWN_REQUEST, f"no request {asked.id.hex()} is known here")
    elif ended.transcript is None and asked.have < ended.end.count:
        _refuse(state, client, asked.id, Code.EXPIRED, f"the tokens of request {asked.id.hex()} are gone")
    else:
        ended.owed.add(client.session)
        ending.tell(state, client, ended, asked.have, now_ms, with_page=True)


def cancel(state: State, client: ClientEntry, asked: m.Cancel, now_ms: int) -> None:
    """Idempotent, and always answered by the END, also when it came too late."""
    request = state.requests.get(asked.id)
    if request is not None:
        follow(request, client)
        state.counters.cancelled += 1
        request.note(now_ms, "cancelled", f"by client {client.hello.name or client.session.hex()}")
        ending.finish(state, request, "cancelled", now_ms)
        return
    ended = state.archive.get(asked.id)
    if ended is None:
        _refuse(state, client, asked.id, Code.UNKNOWN_REQUEST, f"no request {asked.id.hex()} is known here")
    else:
        state.out.append(ToClient(client.route, client.session, ended.end))


def acknowledge(state: State, client: ClientEntry, ack: m.EndAck) -> None:
    for id in ack.ids:
        client.unacked.pop(id, None)
        state.archive.acknowledged(id, client.session)


def follow(request: Request, client: ClientEntry) -> None:
    client.following[request.id] = None
    request.followers[client.session] = None
    if request.stream and client.topic not in request.topics:
        request.topics = (*request.topics, client.topic)


def unfollow(state: State, client: ClientEntry, now_ms: int) -> None:
    """The client is gone. What nobody follows any more is cancelled, unless it was meant to run alone."""
    for id in client.unacked:
        state.archive.acknowledged(id, client.session)
    for id in list(client.following):
        _unfollow_one(state, client, id, "its client is gone", now_ms)


def detach(state: State, client: ClientEntry, asked: m.Detach, now_ms: int) -> None:
    """Nothing is answered. Whatever of it is on its way meets a client that is not interested."""
    if client.unacked.pop(asked.id, None) is not None:
        state.archive.acknowledged(asked.id, client.session)
    if asked.id in client.following:
        _unfollow_one(state, client, asked.id, "nobody follows it any more", now_ms)


def _unfollow_one(state: State, client: ClientEntry, id: bytes, why: str, now_ms: int) -> None:
    client.following.pop(id)
    request = state.requests.get(id)
    if request is None:
        return
    request.followers.pop(client.session, None)
    request.topics = tuple(topic for topic in request.topics if topic != client.topic)
    if not request.followers and not request.detached:
        state.counters.cancelled += 1
        request.note(now_ms, "cancelled", why)
        ending.finish(state, request, "cancelled", now_ms)


def _place(state: State, model: str) -> tuple[str, ErrorInfo | None]:
    """The model that is meant: the one in the mesh, if there is only one."""
    if model in state.models:
        return model, None
    known = sorted(state.models)
    if not known:
        return "", ErrorInfo(Code.NO_WORKER, "no worker has joined this broker yet", 1_000)
    # One whose last worker has left is still known, but it is no choice while there are others.
    served = [name for name in known if not state.models[name]] or known
    listed = ", ".join(served[:20])
    if model:
        return "", ErrorInfo(Code.UNKNOWN_MODEL, f"no worker serves {model!r}; there is: {listed}")
    if len(served) == 1:
        return served[0], None
    return "", ErrorInfo(Code.MODEL_REQUIRED, f"several models are served, name one of: {listed}")


def _refusal(state: State, asked: m.InferenceRequest, prompt: bytes, now_ms: int) -> ErrorInfo | None:
    if asked.have:
        # Its tokens came from a broker that is gone: another run would not continue them.
        return ErrorInfo(Code.UNKNOWN_REQUEST, "this broker does not know the request; it has been restarted")
    if not prompt and asked.task == "generate":
        return ErrorInfo(Code.BAD_REQUEST, "the prompt is empty")
    if len(prompt) > limits.PROMPT_BYTES:
        return ErrorInfo(Code.TOO_LONG, f"a prompt of {len(prompt)} bytes, {limits.PROMPT_BYTES} are allowed")
    if len(asked.sampling) > limits.SAMPLING_BYTES:
        return ErrorInfo(Code.BAD_REQUEST, f"sampling options over {limits.SAMPLING_BYTES} bytes")
    if asked.task != "generate" and asked.max_tokens > limits.RESULT_PIECES:
        text = f"a result of {asked.max_tokens} pieces, {limits.RESULT_PIECES} are allowed"
        return ErrorInfo(Code.TOO_LONG, text)
    wanted = reservation(asked.max_tokens, asked.logprobs, asked.task) + len(prompt)
    if wanted > state.config.transcript_bytes:
        return ErrorInfo(Code.TOO_LONG, f"max_tokens {asked.max_tokens} is more than this broker can hold")
    if state.room.full(len(prompt)):
        return ErrorInfo(Code.BUSY, f"the queue is full: {state.room.count} requests wait", retry_after(state))
    if state.held_bytes + wanted > state.config.transcript_bytes:
        return ErrorInfo(Code.BUSY, "no room for another answer", retry_after(state))
    return None


def retry_after(state: State) -> int:
    """About how long until a tenth of the queue is served, at the pace of late."""
    low, high = RETRY_AFTER_MS
    if state.rate <= 0:
        return 1_000
    return int(min(max(state.room.count / 10 / state.rate * 1_000, low), high))


def _refuse(state: State, client: ClientEntry, id: bytes, code: Code, text: str) -> None:
    state.counters.refused += 1
    state.out.append(ToClient(client.route, client.session, m.Problem(ErrorInfo(code, text), id)))
