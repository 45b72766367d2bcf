"""A client's words: submit, attach, cancel, acknowledge. Everything a client may ask for is decided here."""

from __future__ import annotations

import msgspec

from llambo.broker.access import permissions
from llambo.broker.actions import ToClient
from llambo.broker.records.accounts import RETRY_AFTER_MS, Account, Refusal
from llambo.broker.records.registry import ClientEntry
from llambo.broker.records.request import Request, RequestState
from llambo.broker.records.state import Early, State
from llambo.broker.records.transcript import reservation
from llambo.broker.requests import adoption, delivery, dispatching, ending
from llambo.broker.requests import adoption as returning
from llambo.mesh.wire import limits, tokens, transfer
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.identity import Identity
from llambo.mesh.wire.naming import MARK, class_of

OTHERWISE = "this answer goes on otherwise than the tokens you hold"


def submit(state: State, client: ClientEntry, asked: m.InferenceRequest, blob: bytes, now_ms: int) -> None:
    """Take a request in, or say why not. The same id again means the same request: its sender joins it."""
    try:
        prompt, held = transfer.unpack(blob, asked.prompt_bytes)
    except ValueError as wrong:
        _refuse(state, client, asked.id, Code.BAD_REQUEST, str(wrong))
        return
    returning.make_way(state, client, asked, held, now_ms)
    if asked.id in state.requests or state.archive.get(asked.id):
        state.counters.attached += 1
        attach(state, client, m.Attach(asked.id, asked.have, held), now_ms)
        return
    if (
        state.identities is not None
        and (forbidden := permissions.not_allowed(state, client.identity, asked)) is not None
    ):
        _turn_down(state, client, asked.id, *forbidden)
        return
    model, error = _place(state, client.identity, asked, now_ms)
    if error is not None and _wait_and_see(state, client, asked, blob, now_ms):
        return
    account = state.accounts.of(client.identity.name)
    refused = _refusal(state, account, asked, prompt, held, now_ms) if error is None else (error.code, error)
    if refused is not None:
        _turn_down(state, client, asked.id, *refused)
        return
    if account.limited:
        account.pay(now_ms)
    _take(state, client, Request(asked, model, prompt, now_ms, account), asked, held, now_ms)


def _take(
    state: State, client: ClientEntry, request: Request, asked: m.InferenceRequest, held: list[bytes], now_ms: int
) -> None:
    state.counters.submitted += 1
    state.admit(request)
    follow(request, client)
    what = f"at most {asked.max_tokens} tokens" if asked.task == "generate" else asked.task
    request.note(now_ms, "submitted", f"model {request.model}, {what}, {asked.priority}")
    if request.deadline_at:
        state.alarm(request.deadline_at, "deadline", request.id)
    if asked.resume or asked.id in state.orphanage:
        request.transcript.restore([tokens.CHUNK + asked.id + chunk[1 + limits.REQUEST_ID_BYTES :] for chunk in held])
        adoption.resume(state, request, now_ms)
    else:
        dispatching.enqueue(state, request, now_ms)
    ahead = state.room.ahead(request) if request.state is RequestState.WAITING else 0
    accepted = m.Accepted(request.id, ahead, request.model, request.fingerprint)
    state.out.append(ToClient(client.route, client.session, accepted))
    if state.early:
        ask_again(state, now_ms)


def _wait_and_see(
    state: State, client: ClientEntry, asked: m.InferenceRequest | m.Attach, blob: bytes, now_ms: int
) -> bool:
    """A broker that has just begun: those who could answer this may be on their way. False: it is old enough."""
    key = (client.session, asked.id)
    early = state.early.get(key)
    began = state.started_at if state.started_at >= 0 else now_ms
    if isinstance(asked, m.Attach) and asked.resume:
        began = now_ms  # however old we are: it was with another broker, and those who know it are on their way
    due = early.due if early else began + state.config.young_ms
    if now_ms >= due:
        return False
    if early is None and (code := _too_early(state, client.identity, asked)) is not None:
        _refuse(state, client, asked.id, code, "this broker has just begun, and too many wait for its workers")
    else:
        state.early[key] = Early(client, asked, blob, due)
    return True


def _too_early(state: State, who: Identity, asked: m.InferenceRequest | m.Attach) -> Code | None:
    """Too many wait like that already: of everybody's, or of what this identity asks for anew."""
    if len(state.early) >= state.config.queue_requests:
        return Code.BUSY
    if not who.max_queued or asked.resume or isinstance(asked, m.Attach):
        return None
    own = [early.message for early in state.early.values() if early.client.identity.name == who.name]
    waiting = sum(isinstance(message, m.InferenceRequest) and not message.resume for message in own)
    return Code.OVER_LIMIT if waiting >= who.max_queued else None


def ask_again(state: State, now_ms: int) -> None:
    """Something is known now that was not before, or the time to wait for it is over."""
    early = list(state.early.items())
    for key, said in early:
        if key not in state.early:
            continue  # one that made sense made sense of this
        if said.client.session not in state.registry.clients:
            del state.early[key]
        elif now_ms >= said.due or _makes_sense(state, said.client.identity, said.message, now_ms):
            del state.early[key]
            if (error := permissions.refusal(state, said.client, said.message)) is not None:
                permissions.refuse(state, said.client, said.message, error)
            elif isinstance(said.message, m.Attach):
                attach_asked(state, said.client, msgspec.structs.replace(said.message, resume=False), now_ms)
            else:
                submit(state, said.client, said.message, said.blob, now_ms)


def _makes_sense(state: State, who: Identity, message: m.InferenceRequest | m.Attach, now_ms: int) -> bool:
    if message.id in state.requests or state.archive.get(message.id):
        return True
    return isinstance(message, m.InferenceRequest) and _place(state, who, message, now_ms)[1] is None


def attach_asked(state: State, client: ClientEntry, asked: m.Attach, now_ms: int) -> None:
    """A result is for whoever asked for it: who only attaches does not know what its bytes mean."""
    try:
        transfer.check(asked.held)
    except ValueError as wrong:
        _refuse(state, client, asked.id, Code.BAD_REQUEST, str(wrong))
        return
    there = state.requests.get(asked.id) or state.archive.get(asked.id)
    if there is not None and there.task != "generate":
        _refuse(state, client, asked.id, Code.BAD_REQUEST, f"request {asked.id.hex()} ({there.task}) makes no stream")
        return
    attach(state, client, asked, now_ms)


def attach(state: State, client: ClientEntry, asked: m.Attach, now_ms: int) -> None:
    """Follow a request from token `have` on, live or ended. What is `held` was checked."""
    adoption.look_for(state, asked, now_ms)
    request = state.requests.get(asked.id)
    if request is not None and not _agreed(state, client, request, asked.held):
        return
    if request is not None:
        follow(request, client)
        ahead = state.room.ahead(request) if request.state is RequestState.WAITING else 0
        accepted = m.Accepted(request.id, ahead, request.model, request.fingerprint)
        state.out.append(ToClient(client.route, client.session, accepted))
        if request.stream and asked.have < request.transcript.next_index:
            delivery.send_page(state, client, m.Replay(asked.id, asked.have))
        return
    ended = state.archive.get(asked.id)
    if ended is None and _wait_and_see(state, client, asked, b"", now_ms):
        return
    if ended is None:
        _refuse(state, client, asked.id, Code.UNKNOWN_REQUEST, f"no request {asked.id.hex()} is known here")
    elif not returning.fits(ended, asked.held):
        _refuse(state, client, asked.id, Code.EXPIRED, OTHERWISE)
    elif ended.transcript is None and asked.have < ended.end.count and ended.end.error is not None:
        _refuse(state, client, asked.id, ended.end.error.code, ended.end.error.text)
    elif ended.transcript is None and asked.have < ended.end.count:
        _refuse(state, client, asked.id, Code.EXPIRED, f"the tokens of request {asked.id.hex()} are gone")
    else:
        ended.owed.add(client.session)
        ending.tell(state, client, ended, asked.have, now_ms, with_page=True)


def _agreed(state: State, client: ClientEntry, request: Request, held: list[bytes]) -> bool:
    """Nobody is given a continuation of something else than what he was given before."""
    if not held or adoption.agrees(request, held):
        return True
    _refuse(state, client, request.id, Code.EXPIRED, OTHERWISE)
    return False


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
        request.forsaken = True
        request.note(now_ms, "cancelled", why)
        ending.finish(state, request, "cancelled", now_ms)


def _place(state: State, who: Identity, asked: m.InferenceRequest, now_ms: int) -> tuple[str, ErrorInfo | None]:
    """The model that is meant: the one in the mesh, if there is only one that this identity may use."""
    model = asked.model
    if model in state.models:
        return model, None
    if asked.resume and model:
        # It was served before: its workers are on their way, or somebody will wait for them in vain.
        state.models[model] = max(1, now_ms)
        return model, None
    if not state.models:
        return "", ErrorInfo(Code.NO_WORKER, "no worker has joined this broker yet", 1_000)
    if model.startswith(MARK):
        return _in_class(state, who, model)
    served = permissions.models(state, who)
    if not served:
        return "", ErrorInfo(Code.NO_WORKER, f"no worker serves a model that {who.name} may use", 1_000)
    listed = ", ".join(served[:20])
    if model:
        return "", ErrorInfo(Code.UNKNOWN_MODEL, f"no worker serves {model!r}; there is: {listed}")
    if len(served) == 1:
        return served[0], None
    return "", ErrorInfo(Code.MODEL_REQUIRED, f"several models are served, name one of: {listed}")


def _in_class(state: State, who: Identity, node_class: str) -> tuple[str, ErrorInfo | None]:
    """`@tiny`: the one model that workers of that class have."""
    found = sorted(model for model in state.models if model.endswith(node_class) and who.may_use(model))
    found = [model for model in found if not state.models[model]] or found
    if len(found) == 1:
        return found[0], None
    if found:
        return "", ErrorInfo(
            Code.MODEL_REQUIRED, f"several models are in that class, name one: {', '.join(found[:20])}"
        )
    classes = ", ".join(sorted({class_of(model) for model in state.models if class_of(model)})[:20]) or "none"
    return "", ErrorInfo(Code.UNKNOWN_MODEL, f"no worker is of class {node_class[1:]!r}; there is: {classes}")


def _refusal(
    state: State, account: Account, asked: m.InferenceRequest, prompt: bytes, held: list[bytes], now_ms: int
) -> Refusal | None:
    """What is wrong with it; or it is too much for its identity, or for all of us."""
    wanted = reservation(asked.max_tokens, asked.logprobs, asked.task) + len(prompt)
    if asked.have != transfer.count(held):
        # Its tokens came from a broker that is gone, and without them another run would not continue them.
        return _no(Code.UNKNOWN_REQUEST, "this broker does not know the request; it has been restarted")
    if held and asked.task != "generate":
        # Two workers need not agree in the last digit, so one does not continue the result of the other.
        return _no(Code.UNKNOWN_REQUEST, "a part of a result is held, and the broker that had the rest is gone")
    if not prompt and asked.task == "generate":
        return _no(Code.BAD_REQUEST, "the prompt is empty")
    if len(prompt) > limits.PROMPT_BYTES:
        return _no(Code.TOO_LONG, f"a prompt of {len(prompt)} bytes, {limits.PROMPT_BYTES} are allowed")
    if len(asked.sampling) > limits.SAMPLING_BYTES:
        return _no(Code.BAD_REQUEST, f"sampling options over {limits.SAMPLING_BYTES} bytes")
    if asked.task != "generate" and asked.max_tokens > limits.RESULT_PIECES:
        text = f"a result of {asked.max_tokens} pieces, {limits.RESULT_PIECES} are allowed"
        return _no(Code.TOO_LONG, text)
    if wanted > state.config.transcript_bytes:
        return _no(Code.TOO_LONG, f"max_tokens {asked.max_tokens} is more than this broker can hold")
    if account.limited and (over := account.refusal(len(prompt), wanted, asked.resume, now_ms)) is not None:
        return over
    if state.room.full(len(prompt)) and not asked.resume:
        return _no(Code.BUSY, f"the queue is full: {state.room.count} requests wait", retry_after(state))
    if state.held_bytes + wanted > state.config.transcript_bytes:
        return _no(Code.BUSY, "no room for another answer", retry_after(state))
    return None


def _no(code: Code, text: str, wait_ms: int = 0) -> Refusal:
    return code, ErrorInfo(code, text, wait_ms)


def retry_after(state: State) -> int:
    """About how long until a tenth of the queue is served, at the pace of late."""
    low, high = RETRY_AFTER_MS
    if state.rate <= 0:
        return 1_000
    return int(min(max(state.room.count / 10 / state.rate * 1_000, low), high))


def _refuse(state: State, client: ClientEntry, id: bytes, code: Code, text: str) -> None:
    wait_ms = retry_after(state) if code in (Code.BUSY, Code.OVER_LIMIT) else 0
    _turn_down(state, client, id, code, ErrorInfo(code, text, wait_ms))


def _turn_down(state: State, client: ClientEntry, id: bytes, reason: str, error: ErrorInfo) -> None:
    state.counters.refused += 1
    state.meter.refused(str(reason))
    state.accounts.of(client.identity.name).refused[str(reason)] += 1
    state.out.append(ToClient(client.route, client.session, m.Problem(error, id)))
