"""Which identity may do what: the one place where a message is refused because of its sender.

(That its session belongs to its key is checked for each message in `core.py`.)

Which role may open which socket is decided earlier, in `zap_handler.py`: a worker's key never reaches the port of
clients.

With keys, each message comes with the key that its connection has proved (libzmq's User-Id). A session belongs to the
key that opened it, a request to the identity that submitted it, a worker's name to its key. A request of another
identity is unknown: the answer is the same as if it did not exist. (A submit is the exception: its id is taken.)
Without keys every peer is `ANYONE`.
"""

from __future__ import annotations

from llambo.broker.records.accounts import Refusal
from llambo.broker.records.archive import EndedRequest
from llambo.broker.records.registry import ClientEntry
from llambo.broker.records.request import Request
from llambo.broker.records.state import State
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.identity import Identity
from llambo.mesh.wire.naming import class_of


def refusal(state: State, client: ClientEntry, message: m.Message) -> ErrorInfo | None:
    """Why this client may not send this; None: it may."""
    if state.access.identities is None:
        return None
    match message:
        case m.DrainWorker() if not client.identity.may_manage:
            return ErrorInfo(Code.FORBIDDEN, "only an admin key may drain workers")
        case m.HoldModel(model=model) if not client.identity.may_use(model):
            return ErrorInfo(Code.FORBIDDEN, f"{client.identity.name} may not use the model {model!r}")
        case m.HoldModel(pin=True) if not client.identity.may_manage:
            return ErrorInfo(Code.FORBIDDEN, "only an admin key may pin models")
        case m.PullModel() if not client.identity.may_manage:
            return ErrorInfo(Code.FORBIDDEN, "only an admin key may let hosts download models")
        case m.PullModel(ref=ref) if not client.identity.may_use(ref):
            return ErrorInfo(Code.FORBIDDEN, f"{client.identity.name} may not use the model {ref!r}")
        case m.Lease() if not client.identity.may_manage:
            return ErrorInfo(Code.FORBIDDEN, "only an admin key may have a lease")
        case m.Query(what="events") if not client.identity.may_manage:
            return ErrorInfo(Code.FORBIDDEN, "only an admin key may read what happened to others")
        case m.Query(what="metrics") if not client.identity.may_manage:
            return ErrorInfo(Code.FORBIDDEN, "only an admin key may read the metrics")
        case m.InferenceRequest(id) if (known := _known(state, id)) and not client.identity.owns(known.owner):
            return ErrorInfo(Code.BAD_REQUEST, f"the id {id.hex()} is taken; choose a random one")
        case m.Attach(id) | m.Cancel(id) | m.Replay(id) if not _is_own(state, client, id):
            return ErrorInfo(Code.UNKNOWN_REQUEST, f"no request {id.hex()} is known here")
        case _:
            return None


def _is_own(state: State, client: ClientEntry, id: bytes) -> bool:
    """Whether what is known of it is this client's. What is not known at all is refused later, in the same words."""
    known = _known(state, id)
    owners = {known.owner} if known is not None else state.recovery.orphans.owners(id)
    return not owners or any(client.identity.owns(owner) for owner in owners)


def _known(state: State, id: bytes) -> Request | EndedRequest | None:
    return state.requests.get(id) or state.archive.get(id)


def not_allowed(state: State, who: Identity, asked: m.InferenceRequest, now_ms: int) -> Refusal | None:
    """Why this identity may not have this, even if the mesh is idle. No answer names a model that it may not use."""
    if not who.may_come_as(asked.priority):
        text = f"{who.name} may not ask for priority {asked.priority!r}; the best it may have is {who.priority_max!r}"
        return "priority_max", ErrorInfo(Code.FORBIDDEN, text)
    if asked.model and not who.may_use(asked.model):
        listed = ", ".join(models(state, who, now_ms)[:20]) or "none of those that are served"
        text = f"{who.name} may not use the model {asked.model!r}; it may use: {listed}"
        return "models", ErrorInfo(Code.FORBIDDEN, text)
    return None


def models(state: State, who: Identity, now_ms: int) -> list[str]:
    """Those it may use and choose from: those with a worker, and those that a host has. If there are none, those that
    get a worker or had one until now.
    """
    known = [model for model in state.models_shown(now_ms) if who.may_use(model)]
    there = [model for model in known if not state.models.unserved_since[model] or model in state.hosts.having] or known
    # The same models again, under the names of their classes, are for requests that name a class.
    return [model for model in there if not class_of(model)] or there


def count_forbidden(state: State, who: Identity) -> None:
    """In the account as well: `llambo status` shows who tries what is not allowed."""
    state.counters.peers.forbidden += 1
    state.access.accounts.of(who.name).refused[str(Code.FORBIDDEN)] += 1


def refuse(state: State, client: ClientEntry, message: m.Message, error: ErrorInfo) -> None:
    count_forbidden(state, client.identity)
    id = getattr(message, "id", b"")
    query = getattr(message, "query", 0)
    state.to_client(client, m.Problem(error, id, query))
