"""The simulator's teeth: each guard of the delivery rules can be taken out of the real source, one at a time.

A guard is named here with the line that holds it and what stands there without it. `install` puts the changed
module in place before anything imports it. Each removal must be noticed within 1,000 seeds; see test_teeth.py.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Guard(NamedTuple):
    module: str
    with_it: str
    without_it: str
    #: Noticed soon only where there are so many brokers; 0: in any world.
    brokers: int = 0
    #: In worlds with hosts.
    hosts: bool = False

    @property
    def path(self) -> Path:
        return ROOT / (self.module.replace(".", "/") + ".py")


_DELIVERY, _ENDING, _MEMBERSHIP = (
    "llambo.broker.requests.delivery",
    "llambo.broker.requests.ending",
    "llambo.broker.workers.membership",
)
_DRAINING = "llambo.broker.workers.draining"
_SUSPICION = "llambo.broker.requests.suspicion"
_QUEUE, _STATE = "llambo.broker.records.fair_share", "llambo.broker.records.state"
_WISHES = "llambo.broker.placement.wishes"
_LOADING, _HOSTED = "llambo.worker.host.loading_core", "llambo.worker.host.hosted_model"
_CLAIMED = "if seq <= beat.seq and key not in beat.claims]"

GUARDS: dict[str, Guard] = {
    "fence": Guard(
        _DELIVERY,
        "request = running.get(key)",
        "request = running.get(key) or state.requests.get(key[:16])",
    ),
    "index": Guard(_DELIVERY, "if first != transcript.next_index:", "if False:"),
    "trim": Guard(_DELIVERY, "new = transcript.trimmed(frame)", "new: bytes | None = frame"),
    "append before forward": Guard(
        _DELIVERY,
        "case Fit.EARLY:\n",
        "case Fit.EARLY:\n            out.extend(topic + frame for topic in request.followers.topics)\n",
    ),
    "end on control": Guard(_ENDING, "    state.to_client(client, ended.end)", "    pass"),
    "end acknowledgement": Guard(_ENDING, "    state.to_worker(worker, m.EndAck([key]))", "    pass"),
    "claimed-set requeue": Guard(_MEMBERSHIP, _CLAIMED, "if False]"),
    "control sequence": Guard(_MEMBERSHIP, _CLAIMED, "if key not in beat.claims]"),
    "receipt is asked for again": Guard(
        _MEMBERSHIP, "            if client.backlog.receipt:\n", "            if False:\n"
    ),
    "receipt counts": Guard("llambo.broker.records.backlog", "self.bytes -= self._asked_bytes", "pass"),
    "lease": Guard(
        _MEMBERSHIP, "if silent_ms >= timing.lease_ms and _lease_is_out(state, worker, now_ms):", "if False:"
    ),
    "a worker with runs has a short lease": Guard(
        _MEMBERSHIP, "if worker.hello.paced and not worker.claims:", "if worker.hello.paced:"
    ),
    "dedup of submits": Guard(
        "llambo.broker.requests.admission",
        "known = asked.id in state.requests or asked.id in state.archive.ended",
        "known = False",
    ),
    "transcript in the re-dispatch": Guard(
        "llambo.broker.requests.dispatching",
        "prefix = request.transcript.ids() if request.transcript.chunks else []",
        "prefix: list[int] = []",
    ),
    "drain is sent again": Guard(
        _DRAINING, "            _send(state, worker, order)\n            return", "            return"
    ),
    "fence left when it moves": Guard(
        "llambo.broker.requests.dispatching", "    state.leave_fence(request)\n    request.note", "    request.note"
    ),
    "moved requests go first": Guard("llambo.broker.core", "        draining.empty(state, now_ms)\n", ""),
    "whole results": Guard(
        "llambo.broker.requests.dispatching", "        request.transcript.clear()\n", "        pass\n"
    ),
    "newer state of the client": Guard(
        "llambo.broker.requests.admission",
        "if known and not recovery.forget_outdated(state, client, asked, held, now_ms):",
        "if known:",
    ),
    "abandoned is not ended": Guard(
        "llambo.broker.requests.recovery",
        "return ended.abandoned or have > ended.end.count",
        "return have > ended.end.count",
    ),
    "no END that is out of date": Guard(
        "llambo.broker.requests.following",
        "outdated = ended is not None and recovery.is_outdated(ended, asked.have)",
        "outdated = False",
        brokers=2,
    ),
    "poison is ended": Guard(_SUSPICION, "if charged and [request] == suspects:", "if False:"),
    "one suspect on an engine": Guard(
        "llambo.broker.records.pools",
        "return worker.dispatchable and not (self.lane.isolated and worker.has_suspect)",
        "return worker.dispatchable",
    ),
    "one suspect of all brokers": Guard(
        "llambo.worker.agent.core",
        "if dispatch.suspect is not None and self.runs.has_suspect():",
        "if False:",
        brokers=2,
    ),
    "progress clears a suspect": Guard(
        _DELIVERY, "if 0 <= request.suspicion.token < transcript.next_index:", "if False:"
    ),
    "kills from outside are not charged": Guard(_SUSPICION, "charged = not lost.outside", "charged = True"),
    "running limit in the queue": Guard(_QUEUE, "if not request.account.full:", "if True:"),
    "running limit without a queue": Guard(
        "llambo.broker.requests.dispatching", " and (not request.account.full or request.run.attempt)", ""
    ),
    "held back until one has ended": Guard(_STATE, "self.queue.eased[account.name] = account", "pass"),
    "identities take turns": Guard(_QUEUE, "self._open.move_to_end(owner)", "pass"),
    "a moved request is charged once": Guard(_STATE, "account.in_flight -= 1", "pass"),
    "limits apply to new requests": Guard(
        "llambo.broker.records.accounts", "        if admitted:\n            return None\n", ""
    ),
    "only what was sealed is adopted": Guard(
        "llambo.broker.requests.recovery", "if key and not seals.is_sealed(", "if key and False and seals.is_sealed("
    ),
    "a seal is for one worker": Guard("llambo.broker.records.seals", "+ time + worker.encode()", "+ time"),
    "no partial result": Guard(
        _ENDING, """    if request.task != "generate" and reason != "stop":\n""", "    if False:\n"
    ),
    "an adapter is part of the fingerprint": Guard(
        "llambo.mesh.wire.naming", "{PLUS}{sha256[:_ADAPTER_DIGITS]}", "{PLUS}{'0' * _ADAPTER_DIGITS}"
    ),
    "tokens wait for their file": Guard(
        "llambo.mesh.client.client_requests",
        "return self.complete or (self.place.known and not self.whole)",
        "return self.complete or not self.whole",
        brokers=2,
    ),
    "without a name no adapter is meant": Guard(
        "llambo.broker.requests.model_names",
        "found = [model for model in found if not has_adapter(model, found)]",
        "pass",
    ),
    "budget of a host": Guard(_LOADING, "if not wait and fits(needs, free):", "if not wait:", hosts=True),
    "what was measured counts, and no less": Guard(
        _LOADING, "model.measured = {RAM: memory_bytes}", "model.measured = {RAM: memory_bytes // 2}", hosts=True
    ),
    "one engine for a model": Guard(
        _LOADING, "if name in self.models and not self.models[name].loaded]", "if name in self.models]", hosts=True
    ),
    "what is in use stays loaded": Guard(
        _HOSTED,
        """return self.state == "ready" and self.active == 0 and not self.holders""",
        """return self.state == "ready" and not self.holders""",
        hosts=True,
    ),
    "what is held stays loaded": Guard(
        _HOSTED,
        """return self.state == "ready" and self.active == 0 and not self.holders""",
        """return self.state == "ready" and self.active == 0""",
        hosts=True,
    ),
    "a model is loaded in one place": Guard(
        "llambo.broker.placement.decide",
        """if model.state == "loading" or model.name in room.load:""",
        "if model.name in room.load:",
        hosts=True,
    ),
    "a wish is sent again": Guard(_WISHES, " or (unmet and read):", ":", hosts=True),
    "a load that fails ends its requests": Guard(
        _WISHES, "if hopeless or request.place.queued_at <= since:", "if False:", hosts=True
    ),
}


_FETCH, _GRANTS = "llambo.worker.share.fetch_core", "llambo.worker.share.grants"
#: Those of files between hosts: tests/sim/files_world.py.
FILE_GUARDS: dict[str, Guard] = {
    "a chunk that is not checked is never written": Guard(
        _FETCH, "keep = sum == self._expected(number) and number in", "keep = number in"
    ),
    "a wrong file is begun anew without those who vouched": Guard(
        _FETCH, "self.dropped |= liars or", "self.vouchers and"
    ),
    "what is lost is asked for again": Guard(_FETCH, "if now_ms - at >= LOST_MS]", "if False]"),
    "no grant, no byte: the key": Guard(_GRANTS, "ticket) and each.key == key", "ticket)"),
    "no grant, no byte: the ticket": Guard(_GRANTS, "hmac.compare_digest(each.ticket, ticket)", "True"),
}


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.path = guard.path

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.guard.module:
            return None
        return importlib.util.spec_from_loader(name, self, origin=str(self.path))

    def exec_module(self, module: ModuleType) -> None:
        source = self.path.read_text()
        assert source.count(self.guard.with_it) == 1, f"the guard is not where it was: {self.guard}"
        changed = source.replace(self.guard.with_it, self.guard.without_it)
        exec(compile(changed, str(self.path), "exec"), module.__dict__)


def install(name: str) -> None:
    guard = (GUARDS | FILE_GUARDS)[name]
    assert guard.module not in sys.modules, "too late: the module has been imported"
    sys.meta_path.insert(0, _Changed(guard))
