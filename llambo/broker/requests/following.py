"""Which clients follow a request: attach, detach, cancel, acknowledge, replay."""

from __future__ import annotations

from llambo.broker.records.registry import ClientEntry
from llambo.broker.records.request import Request, RequestState
from llambo.broker.records.state import State
from llambo.broker.records.transcript import Transcript
from llambo.broker.requests import ending, recovery, refusals
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import transfer
from llambo.mesh.wire.errors import Code, ErrorInfo

OTHER_TOKENS = "this answer goes on otherwise than the tokens you hold"


def attach(state: State, client: ClientEntry, asked: m.Attach, blob: bytes, now_ms: int) -> None:
    """Not to a result: a client that did not ask for it does not know what its bytes mean."""
    try:
        transfer.check(asked.held)
    except ValueError as wrong:
        refusals.refuse(state, client, asked.id, Code.BAD_REQUEST, str(wrong))
        return
    there = state.requests.get(asked.id) or state.archive.get(asked.id)
    if there is not None and there.task != "generate":
        refusals.refuse(
            state, client, asked.id, Code.BAD_REQUEST, f"request {asked.id.hex()} ({there.task}) makes no stream"
        )
        return
    follow_from(state, client, asked, now_ms)


def follow_from(state: State, client: ClientEntry, asked: m.Attach, now_ms: int) -> None:
    """Follow a request from token `have` on, live or ended. What is `held` was checked."""
    recovery.look_for(state, client.identity, asked, now_ms)
    request = state.requests.get(asked.id)
    if request is not None and asked.held and not recovery.accepts(state, request, asked, now_ms):
        # What a client was given never changes, so it is given no continuation of something else.
        refusals.refuse(state, client, request.id, Code.EXPIRED, OTHER_TOKENS)
        return
    request = state.requests.get(asked.id)  # the client may have brought the last token
    if request is not None:
        follow(request, client)
        send_accepted(state, client, request)
        if request.stream and asked.have < request.transcript.next_index:
            _send_page(state, client, m.Replay(asked.id, asked.have))
        return
    ended = state.archive.get(asked.id)
    outdated = ended is not None and recovery.is_outdated(ended, asked.have)
    if (ended is None or outdated) and recovery.defer(state, client, asked, b"", now_ms):
        return
    if ended is None:
        refusals.refuse(state, client, asked.id, Code.UNKNOWN_REQUEST, f"no request {asked.id.hex()} is known here")
    elif outdated:
        text = f"request {asked.id.hex()} has lost its clients, or goes on at another broker"
        refusals.refuse(state, client, asked.id, Code.EXPIRED, text)
    elif not recovery.fits(ended, asked.held, asked.fingerprint):
        refusals.refuse(state, client, asked.id, Code.EXPIRED, OTHER_TOKENS)
    elif ended.transcript is None and asked.have < ended.end.count and ended.end.error is not None:
        refusals.refuse(state, client, asked.id, ended.end.error.code, ended.end.error.text)
    elif ended.transcript is None and asked.have < ended.end.count:
        refusals.refuse(state, client, asked.id, Code.EXPIRED, f"the tokens of request {asked.id.hex()} are gone")
    else:
        ended.owed.add(client.session)
        ending.send_end(state, client, ended, asked.have, now_ms, with_page=True)


def send_accepted(state: State, client: ClientEntry, request: Request) -> None:
    ahead = state.queue.ahead(request) if request.state is RequestState.WAITING else 0
    state.to_client(client, m.Accepted(request.id, ahead, request.model, request.run.fingerprint, request.proof))


def cancel(state: State, client: ClientEntry, asked: m.Cancel, blob: bytes, now_ms: int) -> None:
    """Idempotent. The answer is the END, also when it came too late, or a Problem if the request is not known here."""
    recovery.forget_deferred(state, client, asked.id)
    request = state.requests.get(asked.id)
    if request is not None:
        follow(request, client)
        state.counters.requests.cancelled += 1
        request.note(now_ms, "cancelled", f"by client {client.hello.name or client.session.hex()}")
        ending.finish(state, request, "cancelled", now_ms)
        return
    ended = state.archive.get(asked.id)
    if ended is None:
        refusals.refuse(state, client, asked.id, Code.UNKNOWN_REQUEST, f"no request {asked.id.hex()} is known here")
    else:
        state.to_client(client, ended.end)


def acknowledge(state: State, client: ClientEntry, ack: m.EndAck, blob: bytes, now_ms: int) -> None:
    for id in ack.ids:
        if id and id == client.backlog.receipt and client.backlog.confirm():
            state.ask_client(client)
        if client.unacked.pop(id, 0) and not client.hello.incarnation:
            ended = state.archive.get(id)
            if ended is not None and not ended.paid:
                ended.paid = True
                client.backlog.acknowledged()
        state.archive.acknowledged(id, client.session)


def send_late_ends(state: State, client: ClientEntry, now_ms: int) -> None:
    """Send again every END that has gone unacknowledged for too long, the oldest first."""
    if client.backlog.full:
        return
    late: list[bytes] = []
    for id, sent_at in client.unacked.items():
        if now_ms - sent_at < state.config.timing.resend_ms:
            break
        late.append(id)
    for id in late:
        del client.unacked[id]
        ended = state.archive.get(id)
        if ended is not None:
            client.unacked[id] = now_ms
            state.to_client(client, ended.end)


def follow(request: Request, client: ClientEntry) -> None:
    client.following[request.id] = None
    request.followers.add(client, request.stream)


def detach(state: State, client: ClientEntry, asked: m.Detach, blob: bytes, now_ms: int) -> None:
    """It is not answered. A client ignores what is on its way already."""
    recovery.forget_deferred(state, client, asked.id)
    if client.unacked.pop(asked.id, None) is not None:
        state.archive.acknowledged(asked.id, client.session)
    if asked.id in client.following:
        _unfollow(state, client, asked.id, "no client follows it any more", now_ms)


def unfollow_all(state: State, client: ClientEntry, now_ms: int) -> None:
    """The client is gone. What has no follower left is cancelled, unless it is detached."""
    for id in client.unacked:
        state.archive.acknowledged(id, client.session)
    for id in list(client.following):
        _unfollow(state, client, id, "its client is gone", now_ms)


def _unfollow(state: State, client: ClientEntry, id: bytes, why: str, now_ms: int) -> None:
    client.following.pop(id)
    request = state.requests.get(id)
    if request is None:
        return
    request.followers.remove(client)
    if not request.followers and not request.asked.detached:
        state.counters.requests.cancelled += 1
        request.followers.abandoned = True
        request.note(now_ms, "cancelled", why)
        ending.finish(state, request, "cancelled", now_ms)


# --- tokens that a client misses ---


def replay(state: State, client: ClientEntry, asked: m.Replay, blob: bytes, now_ms: int) -> None:
    if _transcript(state, asked.id) is None:
        code = Code.EXPIRED if state.archive.get(asked.id) else Code.UNKNOWN_REQUEST
        text = f"the tokens of request {asked.id.hex()} are not stored here"
        state.to_client(client, m.Problem(ErrorInfo(code, text), asked.id))
        return
    state.counters.tokens.replays_served += 1
    _send_page(state, client, asked)


def _send_page(state: State, client: ClientEntry, asked: m.Replay) -> None:
    transcript = _transcript(state, asked.id)
    if transcript is not None and state.may_push_to(client):
        chunks, after = transcript.page(asked.first, asked.until)
        state.to_client(
            client, m.Page(asked.id, asked.first, max(after, asked.first), transcript.next_index, chunks=chunks)
        )


def _transcript(state: State, id: bytes) -> Transcript | None:
    """What a client may have of it. Of a result that is not whole that is nothing: it may yet be begun again."""
    request = state.requests.get(id)
    if request is not None:
        return request.transcript if request.task == "generate" else Transcript(0)
    ended = state.archive.get(id)
    return ended.transcript if ended else None
