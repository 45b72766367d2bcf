"""Why a request is refused, and how its client learns of it."""

from __future__ import annotations

from llambo.broker.records.accounts import Account, Refusal
from llambo.broker.records.registry import ClientEntry
from llambo.broker.records.state import State
from llambo.broker.records.transcript import reservation
from llambo.mesh.wire import limits, transfer
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo

#: When to try again at the earliest if this broker does not keep up.
BEHIND_MS = 2_000


def limit_reached(
    state: State,
    account: Account,
    asked: m.InferenceRequest,
    prompt: bytes,
    held: list[bytes],
    admitted: bool,
    now_ms: int,
) -> Refusal | None:
    """What is wrong with it; or it is too much for its identity, or for this broker.

    `admitted`: another broker has admitted it, or this one before a restart.
    """
    bounds = state.config.bounds
    wanted = reservation(asked.max_tokens, asked.logprobs, asked.task) + len(prompt)
    if (held or asked.have) and asked.have != (count := transfer.count(held)):
        # Without its tokens another run would not continue them. They are missing if prompt and tokens do not fit into
        # a frame (`transfer.pack`).
        text = f"the client holds {asked.have} tokens and sent {count}, and this broker does not know the others"
        return _no(Code.UNKNOWN_REQUEST, text)
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
    if wanted > bounds.transcript_bytes:
        return _no(Code.TOO_LONG, f"max_tokens {asked.max_tokens} is more than this broker can hold")
    if state.measured.load.behind and not admitted:
        state.measured.load.refused += 1
        return _no(Code.BUSY, "this broker does not keep up", max(BEHIND_MS, retry_after(state)))
    if account.limited and (over := account.refusal(len(prompt), wanted, admitted, now_ms)) is not None:
        return over
    if state.queue.full(len(prompt)) and not admitted:
        return _no(Code.BUSY, f"the queue is full: {state.queue.count} requests wait", retry_after(state))
    if state.held_bytes + wanted > bounds.transcript_bytes:
        return _no(Code.BUSY, "no room for another answer", retry_after(state))
    return None


def _no(code: Code, text: str, wait_ms: int = 0) -> Refusal:
    return code, ErrorInfo(code, text, wait_ms)


def retry_after(state: State) -> int:
    """About how long until a tenth of the queue is served."""
    return state.measured.end_rate.wait_ms(state.queue.count / 10)


def refuse(state: State, client: ClientEntry, id: bytes, code: Code, text: str) -> None:
    wait_ms = retry_after(state) if code in (Code.BUSY, Code.OVER_LIMIT) else 0
    turn_down(state, client, id, code, ErrorInfo(code, text, wait_ms))


def turn_down(state: State, client: ClientEntry, id: bytes, reason: str, error: ErrorInfo) -> None:
    """`reason`: the code of the error, or the limit that was reached."""
    state.counters.requests.refused += 1
    state.measured.meter.refused(str(reason))
    state.access.accounts.of(client.identity.name).refused[str(reason)] += 1
    state.to_client(client, m.Problem(error, id))
