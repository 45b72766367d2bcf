"""Clients that were elsewhere: with another broker, and now they are back, or have come from one.

A client follows one broker at a time and believes that one alone. So what this broker knows of a request may be out of
date. While its client was away it was cancelled here, since nobody followed it; or it went on here in one way and there
in another. The client has the prompt and every token it was given, so its word holds: what does not fit is forgotten,
and the request begins again, as one from a broker that is gone (adoption.py). Unless somebody else follows it here, who
was given other tokens: then both cannot be served, and who is here stays.
"""

from __future__ import annotations

from llambo.broker import adoption, ending
from llambo.broker.archive import Ended
from llambo.broker.registry import ClientEntry
from llambo.broker.state import State
from llambo.mesh import messages as m
from llambo.mesh import tokens


def make_way(state: State, client: ClientEntry, asked: m.InferenceRequest, held: list[bytes], now_ms: int) -> None:
    """Before a submit is looked at: forget what is known of it, if that is of no use to its client."""
    request = state.requests.get(asked.id)
    ended = state.archive.get(asked.id)
    if request is not None and held and not adoption.agrees(request, held):
        if _all_his(state, client, request.followers):
            ending.forget(state, request, now_ms)
    elif ended is not None and not _serves(ended, asked, held) and _all_his(state, client, ended.owed):
        state.archive.forget(asked.id)


def fits(ended: Ended, held: list[bytes]) -> bool:
    """Whether these are the first tokens of what it was."""
    if ended.transcript is None or not held:
        return True
    ours, theirs = ended.transcript.ids(), tokens.ids_of(held)
    return ours[: len(theirs)] == theirs


def _serves(ended: Ended, asked: m.InferenceRequest, held: list[bytes]) -> bool:
    if ended.forsaken:
        return False
    if len(tokens.ids_of(held)) > ended.end.count:
        return False  # it got further elsewhere, whatever the end was here
    if ended.transcript is None:
        # Nobody can say any more whether it is the answer that this client has a part of. (One that failed, or was
        # cancelled by somebody, is not tried again.)
        return ended.end.reason not in ("stop", "length", "deadline")
    return fits(ended, held)


def _all_his(state: State, client: ClientEntry, sessions: dict[bytes, None] | set[bytes]) -> bool:
    """Whether nobody follows it but sessions of this very client, from before."""
    others = [state.registry.clients[session] for session in sessions if session in state.registry.clients]
    return all(other is client or other.is_same(client) for other in others)
