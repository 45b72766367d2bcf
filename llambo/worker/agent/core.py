"""The worker core: all decisions of an agent.

A worker connects brokers with its engine child. Brokers send it dispatches over links; it hands each to the engine
as a run, publishes what the engine produces, and stores those tokens until the broker has acknowledged the END, so that
any part can be asked for again. Three rules are essential:

    claims    every heartbeat names every run this worker holds, running or ended, with its next token index. A
              dispatch the broker sent at or before `seq` and that is not claimed was lost on the way.
    the END   is sent on control every half second until it is acknowledged; nothing else frees a run
    outputs   of a run that was cancelled, dropped or lost with its engine are discarded

The engine may die at any moment: its active runs are then reported as lost, and the broker continues them elsewhere;
runs that had ended are still here. A broker may die as well: its runs go on, and are offered to others (`Orphans`).

Events come in through `handle`, which returns actions. There is no clock, socket or randomness in here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import assert_never

from llambo.mesh.link.link_core import LinkCore, LinkProblem, LinkState
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import transfer
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.timers import NEVER_MS
from llambo.mesh.wire.tokens import UNDECODABLE
from llambo.worker.agent import events as e
from llambo.worker.agent.announcement import Announcement, ProcessIdentity
from llambo.worker.agent.delivery import Delivery, Orphans, TokenRate
from llambo.worker.agent.drain import DrainState
from llambo.worker.agent.engine_life import EngineLife
from llambo.worker.agent.events import Action, Exit, Log, NotifyReady, StartRun
from llambo.worker.agent.runs import Run, RunState, RunTable, RunTokens
from llambo.worker.config import WorkerConfig
from llambo.worker.engine.protocol import Progress, Ready, Refused, Start, Step, start_of

#: The longest reason in a goodbye.
GOODBYE_CHARS = 256
#: How often the reason is logged why a broker does not admit this worker.
REPEAT_MS = 60_000
_LASTING = (LinkProblem.REFUSED, LinkProblem.KEY_DENIED, LinkProblem.KEY_MISMATCH, LinkProblem.NO_HANDSHAKE)


@dataclass(slots=True)
class _Session:
    """What has to be remembered for each broker."""

    #: The highest control sequence number received; see `claims`.
    seq: int = 0
    #: Slots taken by runs of other brokers, as last reported to this one.
    busy: int = 0
    #: The broker says that it has dispatched something that has not ended.
    dispatched: bool = False


class WorkerCore:
    """`identity` is what the shell has drawn at random or read from the machine."""

    def __init__(self, config: WorkerConfig, identity: ProcessIdentity) -> None:
        self.exited = False
        self._config = config
        self._out: list[Action] = []
        self.engine = EngineLife(config, self._out)
        self._announcement = Announcement(config, identity, self.engine)
        self.links = {
            number: LinkCore(number, partial(self._hello, number), self._out.append, redundant=len(config.brokers) > 1)
            for number in range(len(config.brokers))
        }
        #: The last result of `next_wakeup_ms`.
        self._expected_ms = NEVER_MS
        self.rate = TokenRate()
        self.delivery = Delivery(self.links, self.rate, self._out)
        self.orphans = Orphans(self.links, self.delivery, self._out, config.orphan_ms)
        self._link_log = LinkLog(config.brokers, self._out.append)
        self._sessions = {number: _Session() for number in self.links}
        self._active = 0
        self.ready_notified = False
        self.drain = DrainState(config.drain_ms)

    @property
    def runs(self) -> RunTable:
        return self.delivery.runs

    def handle(self, event: e.Event, now_ms: int) -> list[Action]:
        if self.exited:
            return []
        self.rate.on_time_passed(self.runs.streams, now_ms)
        self.engine.on_late_wakeup(now_ms - self._expected_ms)
        self._expected_ms = NEVER_MS
        match event:
            case Step(outputs):
                self.engine.on_alive(now_ms)
                self.delivery.on_outputs(outputs, now_ms)
            case e.ControlArrived():
                self._on_control(event, now_ms)
            case e.Subscribed(link):
                self.links[link].beats.now()
            case e.ConnectionChanged(link, change):
                self.links[link].on_connection(change, now_ms)
            case Ready():
                self._on_ready(event, now_ms)
            case Progress():
                self.engine.on_progress(event, now_ms)
            case Refused(key, error, final):
                self._on_engine_refused(key, error, final)
            case e.EngineDied(text, outside):
                fatal = self.engine.on_died(text, now_ms, outside=outside)
                self._lose_runs(text, outside=outside)
                if fatal:
                    self._leave(f"cannot serve {self._config.model}: {fatal}", now_ms, status=1)
            case e.StopRequested(urgent, unless_busy):
                if unless_busy and self.runs.active:
                    self.drain.refusals += 1
                else:
                    self._announce_change(self.drain.stop(urgent, now_ms))
            case e.Ticked():
                pass
            case _:
                assert_never(event)
        if not self.exited:
            self._tick(now_ms)
        actions = self._out[:]
        self._out.clear()
        return actions

    def next_wakeup_ms(self) -> int:
        if self.exited:
            return NEVER_MS
        engine_ms = self.engine.next_wakeup_ms(self.runs.active > 0)
        links_ms = min(link.next_wakeup_ms() for link in self.links.values())
        runs_ms = min(self.delivery.next_wakeup_ms(), self.orphans.next_wakeup_ms())
        self._expected_ms = min(engine_ms, self.drain.stop_at_ms, runs_ms, links_ms)
        return self._expected_ms

    @property
    def state(self) -> m.WorkerState:
        if self.drain.draining:
            return "draining"
        return "ready" if self.engine.is_ready else "starting"

    # The engine.

    def _on_ready(self, ready: Ready, now_ms: int) -> None:
        if not self.engine.on_ready(ready, now_ms):
            return
        self._out.append(Log(f"engine: ready, {ready.slots} slots, {', '.join(model.name for model in ready.models)}"))
        for link in self.links.values():
            link.beats.now()
        self._notify_ready()
        if not any(link.welcomed for link in self.links.values()):
            self._link_log.write_again("the engine is ready, but this worker gets no requests: ")

    def _on_engine_refused(self, key: bytes, error: ErrorInfo, final: bool) -> None:
        run = self.runs.get(key)
        if run is not None and run.state is RunState.STARTING:
            self.runs.drop(run)
            self._reject(run.link, run.id, run.dispatch, error, final)

    def _lose_runs(self, text: str, *, outside: bool = False) -> None:
        self.delivery.on_engine_lost(text, self.engine.last_alive_ms, outside=outside)
        for link in self.links.values():
            link.beats.now()

    # Brokers.

    def _on_control(self, event: e.ControlArrived, now_ms: int) -> None:
        number, link = event.link, self.links[event.link]
        for message, blob in event.messages:
            if isinstance(message, m.Welcome):
                self._on_welcome(number, message, now_ms)
            elif link.on_control(event.session, now_ms):
                self._on_message(number, message, blob, now_ms)

    def _on_welcome(self, number: int, welcome: m.Welcome, now_ms: int) -> None:
        if self.links[number].on_welcome(welcome, now_ms):
            self._sessions[number].seq, self._sessions[number].dispatched = 0, False
            self.orphans.on_welcome(number, now_ms)

    def _on_message(self, number: int, message: m.Message, blob: bytes, now_ms: int) -> None:
        link = self.links[number]
        match message:
            case m.BrokerHeartbeat():
                self._on_sequence(number, message.seq)
                link.on_heartbeat(message)
                if message.busy and not self._sessions[number].dispatched:
                    link.beats.soon(now_ms)  # so that a dispatch that was lost is noticed
                self._sessions[number].dispatched = message.busy
                link.on_proof(message.echo, now_ms)
                link.on_missing(link.beats.number - message.echo, now_ms)
            case m.Dispatch():
                self._on_dispatch(number, message, blob, now_ms)
            case m.Adopt():
                self._on_sequence(number, message.seq)
                self.orphans.adopt(number, message, now_ms)
                link.beats.now()
            case m.EndAck():
                self.delivery.on_ack(number, message)
            case m.Replay():
                self.delivery.on_replay(number, message)
            case m.Cancel():
                self.delivery.on_cancel(number, message, now_ms)
            case m.Drain():
                self._announce_change(self.drain.on_order(message))
            case m.Problem():
                self._on_problem(number, message, now_ms)
            case m.Goodbye():
                self._on_link_refused(number, f"the broker left: {message.reason or 'goodbye'}", now_ms)
            case _:
                self._out.append(Log(f"a {type(message).__name__} is not a message for a worker", warning=True))

    def _on_sequence(self, number: int, seq: int) -> None:
        session = self._sessions[number]
        session.seq = max(session.seq, seq)

    def _on_dispatch(self, number: int, dispatch: m.Dispatch, blob: bytes, now_ms: int) -> None:
        self._on_sequence(number, dispatch.seq)
        if self.runs.get(key := dispatch.id + dispatch.dispatch) is not None:
            return
        try:
            prompt, chunks = transfer.unpack(blob, dispatch.prompt_bytes)
        except ValueError as error:
            self._reject(number, dispatch.id, dispatch.dispatch, ErrorInfo(Code.BAD_REQUEST, str(error)), True)
            return
        start = self._admit(dispatch, prompt)
        if isinstance(start, ErrorInfo):
            final = start.code is Code.BAD_REQUEST
            self._reject(number, dispatch.id, dispatch.dispatch, start, final)
            self.links[number].beats.soon(now_ms)  # so that the broker learns how many slots are free
            return
        if self.runs.active == 0:
            self.engine.on_alive(now_ms)  # it was idle, so it could be silent until now
        deadline_at = now_ms + dispatch.deadline_ms if dispatch.deadline_ms else 0
        self.runs.add(
            Run(
                key=key,
                link=number,
                tokens=RunTokens.of(dispatch, chunks),
                dispatched=dispatch,
                prompt=prompt,
                deadline_at=deadline_at,
                published=dispatch.task == "generate",
                started_at=now_ms,
            )
        )
        self._out.append(StartRun(start))
        self.links[number].send(m.Accept(dispatch.id, dispatch.dispatch))

    def _admit(self, dispatch: m.Dispatch, prompt: bytes) -> Start | ErrorInfo:
        """The message for the engine, or why this dispatch cannot be accepted."""
        ready = self.engine.ready
        if self.drain.draining:
            return ErrorInfo(Code.BUSY, "this worker is draining")
        if ready is None or not self.engine.is_ready:
            return ErrorInfo(Code.BUSY, "the engine is starting")
        if dispatch.suspect is not None and self.runs.has_suspect():
            return ErrorInfo(Code.BUSY, "another suspect is running here")
        if self.runs.active >= ready.slots:
            return ErrorInfo(Code.BUSY, f"all {ready.slots} slots are taken")
        if not self._announcement.serves(dispatch.model):
            return ErrorInfo(Code.UNKNOWN_MODEL, f"this worker has no model {dispatch.model!r}")
        try:
            return start_of(dispatch, prompt)
        except UNDECODABLE as error:
            return ErrorInfo(Code.BAD_REQUEST, f"sampling options: {error}")

    def _reject(self, number: int, request: bytes, dispatch: bytes, error: ErrorInfo, final: bool) -> None:
        if self.links[number].welcomed:
            self.links[number].send(m.Reject(request, dispatch, error, final))

    def _on_problem(self, number: int, problem: m.Problem, now_ms: int) -> None:
        link, error = self.links[number], problem.error
        if link.state is LinkState.GREETING or error.code in (Code.UNKNOWN_SESSION, Code.UNAUTHORIZED):
            self._on_link_refused(number, error.text, now_ms)
        else:
            self._out.append(Log(f"the broker reports a problem: {error.code}: {error.text}", warning=True))

    def _on_link_refused(self, number: int, text: str, now_ms: int) -> None:
        link = self.links[number]
        if link.welcomed or link.state is LinkState.GREETING:
            link.on_refused(text, now_ms)

    # Stopping.

    def _announce_change(self, text: str) -> None:
        """Log it and notify every broker at once; empty if nothing has changed."""
        if text:
            self._out.append(Log(text))
            for link in self.links.values():
                link.beats.now()

    def _leave_when_done(self, now_ms: int) -> None:
        # Without a session the runs cannot be delivered, and a broker met later would drop them anyway.
        connected = any(link.welcomed for link in self.links.values())
        if len(self.runs) and connected and now_ms < self.drain.stop_at_ms:
            return
        text = f"stopped; {len(self.runs)} runs go on elsewhere" if len(self.runs) else "stopped, nothing left to do"
        self._leave(text, now_ms)

    def _leave(self, text: str, now_ms: int, status: int = 0) -> None:
        for link in self.links.values():
            link.leave(text[:GOODBYE_CHARS] if status else "stopped", now_ms)
        self.engine.kill()
        self.exited = True
        self._out.append(Exit(text, status))

    # Time.

    def _tick(self, now_ms: int) -> None:
        if self.drain.stopping:
            self._leave_when_done(now_ms)
            if self.exited:
                return
        if self.engine.tick(now_ms, self.runs.active > 0):
            self._lose_runs(self.engine.note)
        self.delivery.tick(now_ms)
        self.orphans.tick(now_ms)
        if self.runs.active != self._active and len(self.links) > 1:
            self._active = self.runs.active
            for number, link in self.links.items():
                if self.runs.busy_elsewhere(number) != self._sessions[number].busy:
                    link.beats.soon(now_ms)  # a run of another broker has taken or freed a slot
        quiet = self.engine.is_ready and not self.rate.last
        for number, link in self.links.items():
            serves = self.runs.serves(number)
            idle = quiet and not serves and not self._sessions[number].dispatched
            link.on_load(now_ms, idle=idle, serves=serves)
            if now_ms >= link.next_wakeup_ms() and link.tick(now_ms):
                self._beat(number, now_ms)
            if self._link_log.changed(link):
                self._on_link_changed(link, now_ms)

    def _beat(self, number: int, now_ms: int) -> None:
        link, session = self.links[number], self._sessions[number]
        link.publish_beat()
        rate, pace = self.rate.sample(now_ms)
        update = self._announcement.update_for(number)
        session.busy = self.runs.busy_elsewhere(number)
        link.send(
            m.WorkerHeartbeat(
                seq=session.seq,
                beat=link.beats.number,
                claims=self.runs.claims(number),
                busy=session.busy,
                state=self.state,
                rate=rate,
                pace=pace,
                wary=self.runs.has_suspect(except_link=number),
                note=self.engine.note[:256],
                engine_restarts=self.engine.restarts,
                percent=self.engine.percent if self.state == "starting" else 0,
                models=update.models if update else [],
                slots=update.slots if update else 0,
                library=update.library if update else "",
                drained=self.drain.drained,
                moving=self.drain.moving,
            )
        )

    def _on_link_changed(self, link: LinkCore, now_ms: int) -> None:
        if not link.welcomed:
            self.orphans.on_link_lost(link.link, now_ms)
        self._link_log.write(link, now_ms)
        if link.up:
            self._notify_ready()

    def _notify_ready(self) -> None:
        """Once: the engine is ready, and a broker can dispatch to this worker."""
        if not self.ready_notified and self.engine.is_ready and any(link.up for link in self.links.values()):
            self.ready_notified = True
            self._out.append(NotifyReady())

    def _hello(self, number: int) -> m.WorkerHello:
        greetings, ordered = self.links[number].attempts.greetings, self.drain.ordered
        return self._announcement.hello(number, greetings, self.state, ordered=ordered)


class LinkLog:
    """Log lines about links: one for each change of state, and one for each new reason why there is no broker.

    A reason that lasts until a person acts is repeated: the first line is soon hidden by those of the engine.
    """

    def __init__(self, brokers: tuple[str, ...], emit: Callable[[Log], None]) -> None:
        self._brokers = brokers
        self._emit = emit
        self._states: dict[int, LinkState] = {}
        #: The reason why a link is down, its line, and when it was logged.
        self._problems: dict[int, tuple[str, str, int]] = {}
        #: Links that were up, and those of which a warning was logged since then: that it is over is logged as well.
        self._were_up: set[int] = set()
        self._warned: set[int] = set()

    def changed(self, link: LinkCore) -> bool:
        """True if the link's state differs from that of the last call."""
        before, self._states[link.link] = self._states.get(link.link), link.state
        return before is not link.state

    def write(self, link: LinkCore, now_ms: int) -> None:
        number = link.link
        if link.state is LinkState.DOWN and link.problem:
            reason, _, logged_at = self._problems.get(number, ("", "", 0))
            due = link.cause in _LASTING and now_ms - logged_at >= REPEAT_MS
            if reason != link.problem or due:
                address = self._brokers[number]
                silent = link.cause is LinkProblem.NO_ANSWER
                text = f"no broker answers at {address}" if silent else f"{address}: {link.problem}"
                self._problems[number] = link.problem, f"{text}; trying again", now_ms
                self._warn(number)
        elif link.state is LinkState.MENDING:
            self._warned.add(number)
            self._emit(Log(f"link {number}: the token plane is down, rebuilding it", warning=True))
        elif link.up:
            self._problems.pop(number, None)
            self._emit(Log(f"link {number}: up, broker {link.terms.broker or 'without a name'}"))
            if number in self._warned:
                again = "connected again to" if number in self._were_up else "connected to"
                self._emit(Log(f"{again} {self._brokers[number]}", warning=True))
            self._were_up.add(number)
            self._warned.discard(number)

    def write_again(self, intro: str) -> None:
        for number in self._problems:
            self._warn(number, intro)

    def _warn(self, number: int, intro: str = "") -> None:
        self._warned.add(number)
        self._emit(Log(f"{intro}{self._problems[number][1]}", warning=True))


def check_invariants(core: WorkerCore) -> None:
    """What is true between any two events. Tests and the simulator check it after each."""
    runs = core.runs.runs
    active = sum(run.active for run in runs.values())
    assert core.runs.active == active, f"{core.runs.active} runs are counted active, {active} are"
    streams = sum(run.active and run.published for run in runs.values())
    assert core.runs.streams == streams, f"{core.runs.streams} runs are counted as streams, {streams} are"
    assert sum(run.suspect for run in runs.values()) <= 1, "two suspects run in one engine"
    ready = core.engine.ready
    assert not active or (ready is not None and active <= ready.slots), f"{active} runs have slots"
    assert not active or core.engine.is_ready, "runs are active in an engine that is not ready"
    resend = {key for _, key in core.delivery.waiting_ends()}
    for key, run in runs.items():
        assert key == run.key
        assert run.state is not RunState.GONE, "a run that is gone is still held"
        assert (run.end is not None) == (run.state is RunState.ENDED), "END and state of a run disagree"
        assert run.end is None or run.end.count == run.tokens.end, "an END counts other tokens than are held"
        assert run.end is None or run.orphan_at or key in resend, "an END would never be sent again"
