"""Which model is meant by the name in a request: a model, `@class`, or nothing."""

from __future__ import annotations

from llambo.broker.access import permissions
from llambo.broker.records.state import State
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.identity import Identity
from llambo.mesh.wire.naming import MARK, class_of

#: Names that an error lists.
LISTED = 20


def resolve(state: State, who: Identity, asked: m.InferenceRequest, now_ms: int) -> tuple[str, ErrorInfo | None]:
    """Without a name: the one in the mesh, if there is only one that this identity may use.

    A model without a worker is waited for if one left a moment ago: it may be restarting. Otherwise the request would
    wait in vain, so it is refused.
    """
    model, known = asked.model, state.models.unserved_since
    if asked.resume and model:
        # It was served before: its workers are on their way, or it will wait for them in vain.
        if model not in known:
            known[model] = max(1, now_ms)
            state.models.claimed.add(model)
        return model, None
    if state.is_held(model, now_ms):
        return model, None
    if not known:
        return "", ErrorInfo(Code.NO_WORKER, "no worker has joined this broker yet", 1_000)
    if model.startswith(MARK):
        return _in_class(state, who, model, now_ms)
    if model in known:
        gone_s = (now_ms - known[model]) // 1_000
        return "", ErrorInfo(Code.NO_WORKER, f"no worker serves {model!r}: the last one left {gone_s} s ago", 1_000)
    served = permissions.models(state, who, now_ms)
    if not served:
        whose = "" if state.access.identities is None else f" that {who.name} may use"
        return "", ErrorInfo(Code.NO_WORKER, f"no worker serves a model{whose}", 1_000)
    listed = ", ".join(served[:LISTED])
    if model:
        return "", ErrorInfo(Code.UNKNOWN_MODEL, f"no worker serves {model!r}; there is: {listed}")
    if len(served) == 1:
        return served[0], None
    return "", ErrorInfo(Code.MODEL_REQUIRED, f"several models are served, name one of: {listed}")


def _in_class(state: State, who: Identity, node_class: str, now_ms: int) -> tuple[str, ErrorInfo | None]:
    """`@tiny`: the one model that workers of that class have."""
    known = state.models.unserved_since
    shown = state.models_shown(now_ms)
    found = [model for model in shown if model.endswith(node_class) and who.may_use(model)]
    found = [model for model in found if not known[model]] or found
    if len(found) == 1:
        return found[0], None
    if found:
        text = f"several models are in that class, name one: {', '.join(found[:LISTED])}"
        return "", ErrorInfo(Code.MODEL_REQUIRED, text)
    classes = ", ".join(sorted({class_of(model) for model in shown if class_of(model)})[:LISTED]) or "none"
    return "", ErrorInfo(Code.UNKNOWN_MODEL, f"no worker is of class {node_class[1:]!r}; there is: {classes}")
