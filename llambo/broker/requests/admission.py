"""A submit: the request is admitted, or refused with a reason. The same id again is the same request: its sender joins.

In this order: is it known already; may this identity ask for it; which model is meant; is there room for it. What a
broker cannot know yet, shortly after its start, it defers instead of refusing it (recovery.py).
"""

from __future__ import annotations

import msgspec

from llambo.broker.access import permissions
from llambo.broker.records import seals
from llambo.broker.records.registry import ClientEntry, WorkerEntry
from llambo.broker.records.request import Request
from llambo.broker.records.state import State
from llambo.broker.requests import dispatching, following, model_names, recovery, refusals
from llambo.mesh.wire import limits, tokens, transfer
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code


def submit(state: State, client: ClientEntry, asked: m.InferenceRequest, blob: bytes, now_ms: int) -> None:
    try:
        prompt, held = transfer.unpack(blob, asked.prompt_bytes)
    except ValueError as wrong:
        refusals.refuse(state, client, asked.id, Code.BAD_REQUEST, str(wrong))
        return
    known = asked.id in state.requests or asked.id in state.archive.ended
    if known and not recovery.forget_outdated(state, client, asked, held, now_ms):
        state.counters.requests.attached += 1
        following.follow_from(
            state, client, m.Attach(asked.id, asked.have, held, fingerprint=asked.fingerprint), now_ms
        )
        return
    identity = client.link.identity
    if state.access.identities is not None:
        forbidden = permissions.not_allowed(state, identity, asked, now_ms)
        if forbidden is not None:
            refusals.turn_down(state, client, asked.id, *forbidden)
            return
    model, error = model_names.resolve(state, identity, asked, now_ms)
    if error is not None and recovery.defer(state, client, asked, blob, now_ms):
        return
    account = state.access.accounts.of(identity.name)
    admitted = seals.is_proved(state.config.marks_key, asked, model, identity.name, prompt)
    refused = (
        refusals.limit_reached(state, account, asked, prompt, held, admitted, now_ms)
        if error is None
        else (error.code, error)
    )
    if refused is not None:
        refusals.turn_down(state, client, asked.id, *refused)
        return
    if account.limited:
        account.pay(now_ms)
    _admit(state, client, Request(asked, model, prompt, now_ms, account), held, now_ms)


def _admit(state: State, client: ClientEntry, request: Request, held: list[bytes], now_ms: int) -> None:
    asked = request.asked
    state.counters.requests.submitted += 1
    state.admit(request)
    following.follow(request, client)
    what = f"at most {asked.max_tokens} tokens" if asked.task == "generate" else asked.task
    request.note(now_ms, "submitted", f"model {request.model}, {what}, {asked.priority}")
    if asked.deadline_ms:
        state.set_alarm(request, "deadline", request.deadline_at)
    if asked.resume or request.owner in state.recovery.orphans.owners(asked.id):
        request.transcript.restore([tokens.CHUNK + asked.id + chunk[1 + limits.REQUEST_ID_BYTES :] for chunk in held])
        recovery.resume(state, request, now_ms)
    else:
        dispatching.enqueue(state, request, now_ms)
    following.send_accepted(state, client, request)
    if state.recovery.deferred:
        retry_deferred(state, now_ms)


def orphan_announced(state: State, worker: WorkerEntry, orphaned: m.Orphan, blob: bytes, now_ms: int) -> None:
    """Here and not in recovery.py, because a deferred submit may be answered with it."""
    recovery.place_orphan(state, worker, orphaned, blob, now_ms)
    retry_deferred(state, now_ms)


def retry_deferred(state: State, now_ms: int) -> None:
    """Something is known now that was not before, or the time to wait for it is over."""
    for key, deferred in list(state.recovery.deferred.items()):
        client, message = deferred.client, deferred.message
        if key not in state.recovery.deferred:
            continue  # handled while another one was
        if client.session not in state.registry.clients:
            del state.recovery.deferred[key]
        elif now_ms >= deferred.due or recovery.is_answerable(state, client.identity, message, now_ms):
            del state.recovery.deferred[key]
            if (error := permissions.refusal(state, client, message)) is not None:
                permissions.refuse(state, client, message, error)
            elif isinstance(message, m.Attach):
                following.attach(state, client, msgspec.structs.replace(message, resume=False), b"", now_ms)
            else:
                submit(state, client, message, deferred.blob, now_ms)
