"""The broker's one door: `handle(event, now_ms)` changes the state and returns what the shell shall do.

No clock, no sockets, no randomness in here or in any rule it calls: the same events at the same times give
the same actions, which is what lets the simulator run years of faults against this very code.

    ClientSaid, WorkerSaid   are opened here: session checked, each message given to its rule
    TokensArrived            a whole drained batch for delivery.py
    Tick                     rounds of heartbeats, alarms, housekeeping; `next_wakeup_ms` says when

The reading order is in ARCHITECTURE.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, assert_never

from llambo.broker import housekeeping, leases
from llambo.broker.access import permissions
from llambo.broker.actions import Action, ToClient, ToWorker
from llambo.broker.config import BrokerConfig
from llambo.broker.events import (
    ClientSaid,
    Counted,
    Event,
    KeysChanged,
    RouteGone,
    StopAsked,
    Subscribed,
    Tick,
    TokensArrived,
    WorkerSaid,
)
from llambo.broker.records.registry import ClientEntry, WorkerEntry
from llambo.broker.records.state import Chance, State
from llambo.broker.report import queries
from llambo.broker.requests import admission, adoption, delivery, dispatching, ending, suspicion
from llambo.broker.workers import draining, membership
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo

ClientRule = Callable[[State, ClientEntry, Any, bytes, int], None]
WorkerRule = Callable[[State, WorkerEntry, Any, int], None]


def _client_heartbeat(state: State, client: ClientEntry, beat: m.ClientHeartbeat, blob: bytes, now_ms: int) -> None:
    client.echo = beat.echo


#: What a client may say, and the rule for it. Heartbeats need none: to be heard is enough.
CLIENT_RULES: dict[type[m.Message], ClientRule] = {
    m.ClientHeartbeat: _client_heartbeat,
    m.InferenceRequest: admission.submit,
    m.Attach: lambda state, client, said, blob, now_ms: admission.attach_asked(state, client, said, now_ms),
    m.Detach: lambda state, client, said, blob, now_ms: admission.detach(state, client, said, now_ms),
    m.Cancel: lambda state, client, said, blob, now_ms: admission.cancel(state, client, said, now_ms),
    m.Replay: lambda state, client, said, blob, now_ms: delivery.replay_asked(state, client, said, now_ms),
    m.EndAck: lambda state, client, said, blob, now_ms: admission.acknowledge(state, client, said),
    m.Query: lambda state, client, said, blob, now_ms: queries.answer(state, client, said, now_ms),
    m.DrainWorker: lambda state, client, said, blob, now_ms: queries.drain(state, client, said, now_ms),
    m.Lease: lambda state, client, said, blob, now_ms: leases.asked(state, client, said, now_ms),
    m.Goodbye: lambda state, client, said, blob, now_ms: membership.lose_client(state, client, now_ms),
}

WORKER_RULES: dict[type[m.Message], WorkerRule] = {
    m.WorkerHeartbeat: membership.worker_heartbeat,
    m.Accept: dispatching.accepted,
    m.Reject: dispatching.rejected,
    m.End: delivery.end_arrived,
    m.EngineLost: suspicion.engine_lost,
    m.Page: delivery.page_arrived,
    m.Goodbye: lambda state, worker, said, now_ms: membership.lose_worker(
        state, worker, f"left: {said.reason or 'goodbye'}", now_ms
    ),
}


class BrokerCore:
    def __init__(self, config: BrokerConfig, chance: Chance) -> None:
        self.state = State(config, chance)

    def handle(self, event: Event, now_ms: int) -> list[Action]:
        state = self.state
        state.out, state.speaker = [], b""
        match event:
            case TokensArrived(frames):
                delivery.tokens_arrived(state, frames, now_ms)
            case ClientSaid():
                self._client_said(event, now_ms)
            case WorkerSaid():
                self._worker_said(event, now_ms)
            case Tick():
                self._tick(now_ms)
            case Subscribed(topic):
                membership.subscribed(state, topic, now_ms)
            case RouteGone(route, to_worker):
                self._route_gone(route, to_worker, now_ms)
            case KeysChanged(identities):
                membership.keys_changed(state, identities, now_ms)
            case Counted():
                state.seen = event
            case StopAsked(reason):
                membership.say_goodbye(state, reason)
            case _:
                assert_never(event)
        draining.empty(state, now_ms)
        dispatching.settle(state, now_ms)
        return state.out

    def next_wakeup_ms(self) -> int:
        """When `Tick` is wanted at the latest."""
        state = self.state
        return min(state.worker_round_at, state.client_round_at, state.sweep_at, state.alarm_at)

    def _client_said(self, said: ClientSaid, now_ms: int) -> None:
        state = self.state
        client = state.registry.clients.get(said.session)
        if client is not None and client.user != said.user:
            client = None  # to know a session is worth nothing under another key
        if client is not None:
            state.speaker = said.session
            client.heard_at = now_ms
            if client.route != said.route:
                state.registry.move_client(client, said.route)
        for message, blob in said.messages:
            if isinstance(message, m.ClientHello):
                membership.client_hello(state, said.route, message, now_ms, said.user)
            elif client is None or client.session not in state.registry.clients:
                self._unknown_session(said.route, said.session, now_ms, to_worker=False)
                break
            elif (error := permissions.refusal(state, client, message)) is not None:
                permissions.refuse(state, client, message, error)
            else:
                CLIENT_RULES[type(message)](state, client, message, blob, now_ms)
        for problem in said.problems:
            state.counters.problems += 1
            state.out.append(ToClient(said.route, said.session, problem))

    def _worker_said(self, said: WorkerSaid, now_ms: int) -> None:
        state = self.state
        worker = state.registry.workers.get(said.session)
        if worker is not None and worker.user != said.user:
            worker = None
        if worker is not None:
            worker.heard_at = now_ms
            worker.route_gone_at = 0
            if worker.route != said.route:
                state.registry.move_worker(worker, said.route)
        for message, blob in said.messages:
            if isinstance(message, m.WorkerHello):
                membership.worker_hello(state, said.route, message, now_ms, said.user)
            elif worker is None or worker.session not in state.registry.workers:
                self._unknown_session(said.route, said.session, now_ms, to_worker=True)
                break
            elif isinstance(message, m.Orphan):
                adoption.announced(state, worker, message, blob, now_ms)
                if state.early:
                    admission.ask_again(state, now_ms)
            else:
                WORKER_RULES[type(message)](state, worker, message, now_ms)
        for problem in said.problems:
            state.counters.problems += 1
            state.out.append(ToWorker(said.route, said.session, problem))

    def _unknown_session(self, route: bytes, session: bytes, now_ms: int, *, to_worker: bool) -> None:
        """Answered under the session that was named, so that a peer can tell an old link's answer from its own."""
        self.state.counters.unknown_sessions += 1
        problem = m.Problem(ErrorInfo(Code.UNKNOWN_SESSION, "say hello first"))
        self.state.out.append((ToWorker if to_worker else ToClient)(route, session, problem))

    def _route_gone(self, route: bytes, to_worker: bool, now_ms: int) -> None:
        """For a client this means nothing yet; a worker has a moment to come back."""
        worker = self.state.registry.worker_routes.get(route) if to_worker else None
        if worker is not None and not worker.route_gone_at:
            worker.route_gone_at = now_ms
            self.state.worker_round_at = min(self.state.worker_round_at, now_ms + self.state.config.reconnect_grace_ms)

    def _tick(self, now_ms: int) -> None:
        state = self.state
        if state.started_at < 0:
            state.started_at = now_ms
        while (alarm := state.next_alarm(now_ms)) is not None:
            kind, id = alarm
            request = state.requests.get(id)
            if request is None:
                continue
            if kind == "repair":
                delivery.repair(state, request, now_ms)
            elif kind == "adopt":
                adoption.give_up(state, request, now_ms)
            elif request.deadline_at and now_ms >= request.deadline_at:
                error = ErrorInfo(Code.DEADLINE, f"not done {now_ms - request.submitted_at} ms after it was asked")
                ending.finish(state, request, "deadline", now_ms, error)
        if now_ms >= state.worker_round_at:
            membership.pardon(state, now_ms - state.worker_round_at, now_ms)
            state.worker_round_at = now_ms + state.config.ping_ms
            membership.worker_round(state, now_ms)
        if now_ms >= state.client_round_at:
            state.client_round_at = now_ms + state.config.heartbeat_ms
            membership.client_round(state, now_ms)
        if now_ms >= state.sweep_at:
            state.sweep_at = now_ms + housekeeping.SWEEP_MS
            housekeeping.sweep(state, now_ms)
