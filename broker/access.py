"""Who may do what: the one place where a message is refused for who said it.

With keys, each message comes with the key that its connection has proved (libzmq's User-Id). A session belongs to the
key that opened it, a request to the identity that submitted it, a worker's name to its key. What is not somebody's
own is unknown to him: the answer is the same as if it did not exist. Without keys everybody is `ANYONE`.
"""

from __future__ import annotations

from llambo.broker.actions import ToClient
from llambo.broker.registry import ClientEntry
from llambo.broker.state import State
from llambo.mesh import messages as m
from llambo.mesh.errors import Code, ErrorInfo


def refusal(state: State, client: ClientEntry, message: m.Message) -> ErrorInfo | None:
    """Why this client may not say this; None: it may."""
    if state.identities is None:
        return None
    match message:
        case m.DrainWorker() if not client.identity.may_manage:
            return ErrorInfo(Code.FORBIDDEN, "only an admin key may drain workers")
        case m.Query(what="events") if not client.identity.may_manage:
            return ErrorInfo(Code.FORBIDDEN, "only an admin key may read what happened to others")
        case m.InferenceRequest(id) if not _is_own(state, client, id):
            return ErrorInfo(Code.BAD_REQUEST, f"the id {id.hex()} is taken; choose a random one")
        case m.Attach(id) | m.Cancel(id) | m.Replay(id) if not _is_own(state, client, id):
            return ErrorInfo(Code.UNKNOWN_REQUEST, f"no request {id.hex()} is known here")
        case _:
            return None


def _is_own(state: State, client: ClientEntry, id: bytes) -> bool:
    """Whether nothing is known of it that this client must not see."""
    known = state.requests.get(id) or state.archive.get(id)
    owners = [known.owner] if known is not None else state.orphanage.owners(id)
    return all(client.identity.owns(owner) for owner in owners)


def refuse(state: State, client: ClientEntry, message: m.Message, error: ErrorInfo) -> None:
    state.counters.forbidden += 1
    id = getattr(message, "id", b"")
    query = getattr(message, "query", 0)
    state.out.append(ToClient(client.route, client.session, m.Problem(error, id, query)))
