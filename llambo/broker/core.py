"""The broker's one door: `handle(event, now_ms)` changes the state and returns what the shell has to do.

No clock and no sockets in here or in any rule it calls, and chance comes from `random_bytes`, an argument: the same
events at the same times give the same actions, which lets the simulator run years of faults against this very code.

    ClientSaid, WorkerSaid   are opened here: session checked, each message given to its rule
    TokensArrived            a whole drained batch for delivery.py
    Tick                     rounds of heartbeats, alarms, housekeeping; `next_wakeup_ms` says when

The reading order is in ARCHITECTURE.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, assert_never

from llambo.broker import fleet_leases, housekeeping, load
from llambo.broker.access import permissions
from llambo.broker.config import BrokerConfig
from llambo.broker.events import (
    Action,
    Arrived,
    ClientSaid,
    Counted,
    Event,
    KeysChanged,
    PeersDisconnected,
    RouteGone,
    StopAsked,
    Subscribed,
    Tick,
    ToClient,
    TokensArrived,
    ToWorker,
    WorkerSaid,
)
from llambo.broker.placement import files, holding, host_sessions, wishes
from llambo.broker.records.hosts import HostEntry
from llambo.broker.records.registry import ClientEntry, P, Sessions, WorkerEntry
from llambo.broker.records.request import Request
from llambo.broker.records.state import Alarm, RandomBytes, State
from llambo.broker.report import queries
from llambo.broker.requests import admission, delivery, dispatching, ending, following, recovery, suspicion
from llambo.broker.workers import draining, membership
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo

#: `rule(state, peer, message, blob, now_ms)`; `blob` is the extra frame of the message.
Rule = Callable[[State, Any, Any, bytes, int], None]

CLIENT_RULES: dict[type[m.Message], Rule] = {
    m.ClientHeartbeat: membership.client_heartbeat,
    m.InferenceRequest: admission.submit,
    m.Attach: following.attach,
    m.Detach: following.detach,
    m.Cancel: following.cancel,
    m.Replay: following.replay,
    m.EndAck: following.acknowledge,
    m.Query: queries.answer,
    m.DrainWorker: draining.asked,
    m.HoldModel: holding.asked,
    m.PullModel: files.asked,
    m.Lease: fleet_leases.asked,
    m.Goodbye: membership.client_left,
}

WORKER_RULES: dict[type[m.Message], Rule] = {
    m.WorkerHeartbeat: membership.worker_heartbeat,
    m.Accept: dispatching.accepted,
    m.Reject: dispatching.rejected,
    m.End: delivery.end_arrived,
    m.EngineLost: suspicion.engine_lost,
    m.Page: delivery.page_arrived,
    m.Orphan: admission.orphan_announced,
    m.Goodbye: membership.worker_left,
}

HOST_RULES: dict[type[m.Message], Rule] = {
    m.HostHeartbeat: host_sessions.reported,
    m.Goodbye: host_sessions.left,
}

#: What a request asked to be looked at for.
ALARM_RULES: dict[Alarm, Callable[[State, Request, int], None]] = {
    "deadline": ending.deadline_passed,
    "repair": delivery.request_replay,
    "adopt": recovery.dispatch_instead,
}
#: What a client may send while it does not read: it is not answered, or shows that the client reads.
UNANSWERED = frozenset({m.ClientHeartbeat, m.EndAck, m.Detach, m.Goodbye})
_UNKNOWN = m.Problem(
    ErrorInfo(Code.UNKNOWN_SESSION, "this broker does not know the session: it, or the connection, is new")
)


class BrokerCore:
    def __init__(self, config: BrokerConfig, random_bytes: RandomBytes) -> None:
        self.state = State(config, random_bytes)

    def handle(self, event: Event, now_ms: int) -> list[Action]:
        state = self.state
        state.out, state.access.speaker = [], b""
        match event:
            case TokensArrived(frames):
                delivery.tokens_arrived(state, frames, now_ms)
            case ClientSaid():
                self._client_said(event, now_ms)
            case WorkerSaid():
                self._worker_said(event, now_ms)
            case Tick():
                load.ticked(state, event, now_ms)
                self._tick(now_ms)
            case Subscribed(topic):
                membership.subscribed(state, topic, now_ms)
            case RouteGone(route, to_worker):
                membership.route_gone(state, route, to_worker, now_ms)
                host_sessions.route_gone(state, route, now_ms)
            case PeersDisconnected():
                membership.find_disconnected(state, now_ms)
            case KeysChanged(identities):
                membership.keys_changed(state, identities, now_ms)
                host_sessions.keys_changed(state, identities, now_ms)
            case Counted():
                state.measured.shell = event
            case StopAsked(reason):
                membership.say_goodbye(state, reason)
                host_sessions.say_goodbye(state, reason)
            case _:
                assert_never(event)
        draining.empty(state, now_ms)
        dispatching.settle(state, now_ms)
        if state.hosts.sessions or state.hosts.changed:
            wishes.settle(state, now_ms)
            if state.pools.touched:
                dispatching.settle(state, now_ms)
        return state.out

    def next_wakeup_ms(self) -> int:
        """When `Tick` is wanted at the latest."""
        return self.state.wakeups.next_wakeup_ms()

    def _client_said(self, said: ClientSaid, now_ms: int) -> None:
        state, clients = self.state, self.state.registry.clients
        client = _sender(clients, said, now_ms)
        if client is not None:
            state.access.speaker = said.session
        for message, blob in said.messages:
            rule = CLIENT_RULES.get(type(message))
            if rule is not None and client is not None and clients.get(said.session) is client:
                if client.backlog.full and type(message) not in UNANSWERED:
                    state.counters.peers.unread += 1  # as if it had been lost
                    continue
                error = permissions.refusal(state, client, message)
                if error is None:
                    rule(state, client, message, blob, now_ms)
                else:
                    permissions.refuse(state, client, message, error)
            elif isinstance(message, m.ClientHello):
                membership.client_hello(state, said.route, message, said.user, now_ms)
                break
            else:
                # Under the session that was named, so that a peer can tell an old link's answer from its own.
                state.counters.peers.unknown_sessions += 1
                state.out.append(ToClient(said.route, said.session, _UNKNOWN))
                break
        if said.problems:
            self._report_problems(client, said, ToClient)

    def _worker_said(self, said: WorkerSaid, now_ms: int) -> None:
        state, workers = self.state, self.state.registry.workers
        worker = _sender(workers, said, now_ms)
        if (
            worker is None
            and state.hosts.sessions
            and (host := _sender(state.hosts.sessions, said, now_ms)) is not None
        ):
            self._host_said(host, said, now_ms)
            return
        for message, blob in said.messages:
            rule = WORKER_RULES.get(type(message))
            if rule is not None and worker is not None and workers.get(said.session) is worker:
                rule(state, worker, message, blob, now_ms)
            elif isinstance(message, m.WorkerHello):
                membership.worker_hello(state, said.route, message, said.user, now_ms)
                break
            elif isinstance(message, m.HostHello):
                host_sessions.joined(state, said.route, message, said.user, now_ms)
                break
            else:
                state.counters.peers.unknown_sessions += 1
                state.out.append(ToWorker(said.route, said.session, _UNKNOWN))
                break
        if said.problems:
            self._report_problems(worker, said, ToWorker)

    def _host_said(self, host: HostEntry, said: WorkerSaid, now_ms: int) -> None:
        state = self.state
        for message, blob in said.messages:
            rule = HOST_RULES.get(type(message))
            if rule is None or state.hosts.sessions.get(said.session) is not host:
                state.counters.peers.unknown_sessions += 1
                state.out.append(ToWorker(said.route, said.session, _UNKNOWN))
                break
            rule(state, host, message, blob, now_ms)
        if said.problems:
            self._report_problems(host, said, ToWorker)

    def _report_problems(
        self, peer: ClientEntry | WorkerEntry | HostEntry | None, said: Arrived, action: type[ToClient] | type[ToWorker]
    ) -> None:
        """A part of one byte is answered with a hundred: a stranger gets one answer, a peer as many as it reads."""
        self.state.counters.peers.problems += len(said.problems)
        for problem in said.problems[: None if peer is not None else 1]:
            if peer is not None and peer.backlog.full:
                break
            if isinstance(peer, ClientEntry):
                self.state.to_client(peer, problem)
            elif isinstance(peer, HostEntry):
                self.state.to_host(peer, problem)
            elif peer is not None:
                self.state.to_worker(peer, problem)
            else:
                self.state.out.append(action(said.route, said.session, problem))

    def _tick(self, now_ms: int) -> None:
        state, wakeups = self.state, self.state.wakeups
        if wakeups.started_at < 0:
            wakeups.started_at = now_ms
        while due := wakeups.alarms.due(now_ms):
            for kind, id in due:
                if (request := state.requests.get(id)) is not None:
                    ALARM_RULES[kind](state, request, now_ms)
        if now_ms >= wakeups.worker_round_at:
            membership.extend_leases(state, now_ms - wakeups.worker_round_at, now_ms)
            wakeups.worker_round_at = now_ms + state.config.timing.ping_ms
            membership.worker_round(state, now_ms)
            host_sessions.heartbeat_round(state, now_ms)
        if now_ms >= wakeups.client_round_at:
            wakeups.client_round_at = now_ms + state.config.timing.heartbeat_ms
            membership.client_round(state, now_ms)
        if now_ms >= wakeups.sweep_at:
            wakeups.sweep_at = now_ms + housekeeping.SWEEP_MS
            housekeeping.sweep(state, now_ms)


def _sender(sessions: Sessions[P], said: ClientSaid | WorkerSaid, now_ms: int) -> P | None:
    """The peer whose session it is. To know a session is of no use under another key."""
    peer = sessions.get(said.session)
    if peer is None or peer.link.user != said.user:
        return None
    peer.link.heard_at = now_ms
    peer.link.route_gone_at = 0
    if peer.link.route != said.route:
        sessions.move(peer, said.route)
    return peer
