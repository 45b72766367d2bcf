"""Which model is meant by the name in a request: a model, `@class`, `+adapter`, or nothing; and whether it can do what
is asked.
"""

from __future__ import annotations

from llambo.broker.access import permissions
from llambo.broker.records.registry import WorkerEntry
from llambo.broker.records.request import Lane
from llambo.broker.records.state import State
from llambo.broker.requests import ending
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.identity import Identity
from llambo.mesh.wire.naming import MARK, PLUS, class_of, has_adapter, without_adapter

#: Names that an error lists.
LISTED = 20
#: By kind: what it does, and what it is not for.
_DOES = {"generate": "generates text", "embed": "embeds texts", "rerank": "reranks documents"}
#: By task, as far as not every model can do it: what a model would have to do.
_WANTED: dict[m.Task, str] = {"generate": "generate text", "embed": "embed texts", "rerank": "rerank documents"}


def resolve(state: State, who: Identity, asked: m.InferenceRequest, now_ms: int) -> tuple[str, ErrorInfo | None]:
    """Without a name: the one in the mesh that can do it, if there is only one that this identity may use.

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
        return model, None if state.models.can(model, asked.task) else cannot(state, who, model, asked.task, now_ms)
    if not known:
        return "", ErrorInfo(Code.NO_WORKER, "no worker has joined this broker yet", 1_000)
    if model.startswith(MARK):
        return _in_class(state, who, asked, now_ms)
    if model.startswith(PLUS):
        return _with_adapter(state, who, asked, now_ms)
    if model in known:
        gone_s = (now_ms - known[model]) // 1_000
        return "", ErrorInfo(Code.NO_WORKER, f"no worker serves {model!r}: the last one left {gone_s} s ago", 1_000)
    served = permissions.models(state, who, now_ms)
    if not served:
        whose = "" if state.access.identities is None else f" that {who.name} may use"
        return "", ErrorInfo(Code.NO_WORKER, f"no worker serves a model{whose}", 1_000)
    listed = ", ".join(served[:LISTED])
    if PLUS in model and (base := without_adapter(model)) in known and who.may_use(base):
        adapters = [each for each in state.models_shown(now_ms) if without_adapter(each) == base != each]
        listed = ", ".join(filter(who.may_use, adapters)) or "none"
        return "", ErrorInfo(
            Code.UNKNOWN_MODEL, f"no worker serves {model!r}; with adapters of {base} there is: {listed}"
        )
    if model:
        return "", ErrorInfo(Code.UNKNOWN_MODEL, f"no worker serves {model!r}; there is: {listed}")
    return _only_one(state, served, asked.task, "several models are served, name one of")


def _in_class(state: State, who: Identity, asked: m.InferenceRequest, now_ms: int) -> tuple[str, ErrorInfo | None]:
    """`@tiny`: the one model that workers of that class have."""
    known, node_class = state.models.unserved_since, asked.model
    shown = state.models_shown(now_ms)
    found = [model for model in shown if model.endswith(node_class) and who.may_use(model)]
    found = [model for model in found if not known[model]] or found
    if found:
        return _only_one(state, found, asked.task, "several models are in that class, name one")
    classes = ", ".join(sorted({class_of(model) for model in shown if class_of(model)})[:LISTED]) or "none"
    return "", ErrorInfo(Code.UNKNOWN_MODEL, f"no worker is of class {node_class[1:]!r}; there is: {classes}")


def _with_adapter(state: State, who: Identity, asked: m.InferenceRequest, now_ms: int) -> tuple[str, ErrorInfo | None]:
    """`+pirate`: the one model that has an adapter of that name."""
    adapters = [model for model in state.models_shown(now_ms) if PLUS in model and who.may_use(model)]
    found = [model for model in adapters if model.endswith(asked.model) and class_of(model) == class_of(asked.model)]
    if found:
        return _only_one(state, found, asked.task, "several models have that adapter, name one of")
    listed = ", ".join(model for model in adapters[:LISTED] if not class_of(model)) or "none"
    text = f"no model has an adapter {asked.model[1:]!r}; with adapters there is: {listed}"
    return "", ErrorInfo(Code.UNKNOWN_MODEL, text)


def _only_one(state: State, found: list[str], task: m.Task, several: str) -> tuple[str, ErrorInfo | None]:
    """Of these models the one that can do the task. One that is made for it goes before one that also can.

    What is about texts and tokens alone is asked of the model that generates. Adapters are only for who names them.
    """
    found = [model for model in found if not has_adapter(model, found)]
    models, kind = state.models, task if task in ("embed", "rerank") else "generate"
    able = [model for model in found if models.can(model, task)]
    if not able:
        return "", _none(task, found)
    made_for_it = [model for model in able if models.kinds.get(model, kind) == kind]
    for choice in (made_for_it, able):
        if len(choice) == 1:
            return choice[0], None
    return "", ErrorInfo(Code.MODEL_REQUIRED, f"{several}: {', '.join((made_for_it or able)[:LISTED])}")


# --- what a model is for ---


def cannot(state: State, who: Identity, model: str, task: m.Task, now_ms: int) -> ErrorInfo:
    """This model is for something else; others that can do it are named."""
    able = [each for each in permissions.models(state, who, now_ms) if state.models.can(each, task)]
    others = f"models that do: {', '.join(able[:LISTED])}" if able else "no model that is served does"
    text = f"the model {model!r} {_DOES[state.models.kinds[model]]}; it does not {_WANTED[task]}; {others}"
    return ErrorInfo(Code.BAD_REQUEST, text, hint="name a model of that kind; `llambo models` lists the kinds")


def _none(task: m.Task, served: list[str]) -> ErrorInfo:
    text = f"no model that is served can {_WANTED[task]}; there is: {', '.join(served[:LISTED])}"
    return ErrorInfo(Code.BAD_REQUEST, text, hint="start a worker with a model of that kind")


def learn_kinds(state: State, worker: WorkerEntry, now_ms: int) -> None:
    """From what a worker announces. Requests that wait for a model that turns out to be for something else end."""
    kinds = state.models.kinds
    for info in worker.serving.infos:
        if not info.kind and worker.state == "starting":
            continue  # its model is being loaded
        kind = info.kind or "generate"
        if kinds.get(info.name) == kind:
            continue
        kinds[info.name] = kind
        for request in list(state.queue.lines.get(Lane(info.name), ())):
            if not state.models.can(info.name, request.asked.task):
                error = cannot(state, request.account.who, info.name, request.asked.task, now_ms)
                ending.finish(state, request, "error", now_ms, error)
