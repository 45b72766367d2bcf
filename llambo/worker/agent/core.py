"""The worker core: everything an agent decides.

A worker is a go-between. Brokers give it dispatches over links; it hands each to its engine child as a run,
publishes what the engine says, and keeps those tokens until the broker has acknowledged the END, so that any
part can be asked for again. Three rules carry the weight:

    claims    every beat names every run this worker holds, running or ended, with its next token index. A
              dispatch the broker made at or before `seq` and that is not claimed was lost on the way.
    the end   END is said on control every half second until it is acknowledged; nothing else frees a run
    a fence   outputs of a run that was cancelled, dropped or lost with its engine go nowhere

The engine may die at any moment: its runs are then reported as lost (the broker continues them elsewhere), runs
that had ended are still here. The broker may die as well: its runs go on, and are offered to the next (orphans.py).

Facts come in by `handle`, orders come out of it; there is no clock, socket or chance in here.
"""

from __future__ import annotations

from functools import partial
from typing import assert_never

import msgspec

from llambo.mesh.link.link_core import LinkCore, LinkProblem, LinkState
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import transfer
from llambo.mesh.wire.errors import TRAITS, Code, ErrorInfo
from llambo.worker.agent import events as e
from llambo.worker.agent.actions import Action, Exit, Log, NotifyReady, StartRun
from llambo.worker.agent.delivery import Delivery
from llambo.worker.agent.engine_life import NEVER_MS, EngineLife
from llambo.worker.agent.introduction import Identity, Introduction
from llambo.worker.agent.orphans import Orphans
from llambo.worker.agent.rate import Rate
from llambo.worker.agent.runs import Run, RunState, Tokens
from llambo.worker.config import WorkerConfig
from llambo.worker.engine.protocol import Start, start_of

# --- Taking no new work, by an operator's order or because this process is to end. ---


class Leaving:
    """The truth about both: brokers come and go, and each may pass on another order."""

    def __init__(self, drain_ms: int) -> None:
        self.drained = False
        #: What runs is to be taken elsewhere: that is for the brokers to do.
        self.moving = False
        #: When to leave at the latest.
        self.at_ms = NEVER_MS
        self._drain_ms = drain_ms

    @property
    def leaves(self) -> bool:
        return self.at_ms != NEVER_MS

    @property
    def draining(self) -> bool:
        return self.drained or self.leaves

    def ordered(self, order: m.Drain) -> str:
        """What is new about that, if anything."""
        before = self.drained, self.moving
        self.drained, self.moving = not order.undo, order.move and not order.undo
        if (self.drained, self.moving) == before:
            return ""
        if not self.drained:
            return "the drain is over"
        return "drained: what runs here goes on elsewhere" if self.moving else "drained: no new work"

    def stop(self, urgent: bool, now_ms: int) -> str:
        """The first time: when all is done, or the time for that is over. The second time: now."""
        again = self.leaves
        self.at_ms = now_ms if urgent or again else now_ms + self._drain_ms
        return "" if again else "stopping: no new work"


# --- What a worker tells of its links: to its operator, and to its supervisor when it is of use for the first time. ---


class Telling:
    def __init__(self, brokers: tuple[str, ...], out: list[Action]) -> None:
        self._brokers = brokers
        self._out = out
        self._told: dict[int, LinkState] = {}
        self._complaints: dict[int, str] = {}

    def news(self, link: LinkCore) -> bool:
        """Whether its state is another one than last time."""
        before, self._told[link.link] = self._told.get(link.link), link.state
        return before is not link.state

    def tell(self, link: LinkCore) -> None:
        number = link.link
        if link.state is LinkState.DOWN and link.problem:
            # Each try fails for the same reason; once is enough.
            if self._complaints.get(number) != link.problem:
                self._complaints[number] = link.problem
                address = self._brokers[number]
                silent = link.cause is LinkProblem.NO_ANSWER
                text = f"no broker answers at {address}" if silent else f"{address}: {link.problem}"
                self._out.append(Log(f"{text}; trying on", warning=True))
        elif link.state is LinkState.MENDING:
            self._out.append(Log(f"link {number}: the token plane is down, rebuilding it", warning=True))
        elif link.up:
            self._complaints.pop(number, None)
            self._out.append(Log(f"link {number}: up, broker {link.terms.broker or 'without a name'}"))


#: Of the reason why it leaves.
GOODBYE_CHARS = 256


class WorkerCore:
    """`identity` brings what is random or read from the machine."""

    def __init__(self, config: WorkerConfig, identity: Identity) -> None:
        self.exited = False
        self._config = config
        self._out: list[Action] = []
        self.engine = EngineLife(config, self._out)
        self._introduction = Introduction(config, identity, self.engine)
        self.links = {
            number: LinkCore(number, partial(self._hello, number), self._out.append, hasty=len(config.brokers) > 1)
            for number in range(len(config.brokers))
        }
        #: By when we wanted to be woken.
        self._promised_ms = NEVER_MS
        self.rate = Rate()
        self.delivery = Delivery(self.links, self.rate, self._out)
        self.runs = self.delivery.runs
        self.orphans = Orphans(self.links, self.delivery, self._out, config.orphan_ms)
        self._telling = Telling(config.brokers, self._out)
        #: Slots that each broker believes to be taken by others.
        self._busy = dict.fromkeys(self.links, 0)
        self._active = 0
        self._seq = dict.fromkeys(self.links, 0)
        self.ready_said = False
        self.leaving = Leaving(config.drain_ms)

    # --- the one door --------------------------------------------------------------------------------

    def handle(self, event: e.Event, now_ms: int) -> list[Action]:
        if self.exited:
            return []
        self.rate.passed(self.runs.streams, now_ms)
        self.engine.pardon(now_ms - self._promised_ms)
        self._promised_ms = NEVER_MS
        match event:
            case e.EngineStep(outputs):
                self.engine.on_word(now_ms)
                self.delivery.on_outputs(outputs, now_ms)
            case e.ControlArrived():
                self._on_control(event, now_ms)
            case e.Subscribed(link):
                self.links[link].beats.now()
            case e.ConnectionChanged(link, change):
                self.links[link].on_connection(change, now_ms)
            case e.EngineReady():
                self._on_ready(event, now_ms)
            case e.EngineProgressed(note, problem, percent):
                self.engine.on_progress(note, problem, percent, now_ms)
            case e.EngineRefused(key, error, final):
                self._on_refused(key, error, final)
            case e.EngineDied(text, outside):
                hopeless = self.engine.on_died(text, now_ms)
                self._lose_runs(text, outside=outside)
                if hopeless:
                    self._leave(f"cannot serve {self._config.model}: {hopeless}", now_ms, status=1)
            case e.StopRequested(urgent):
                self._tell_all(self.leaving.stop(urgent, now_ms))
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
        self._promised_ms = min(engine_ms, self.leaving.at_ms, runs_ms, links_ms)
        return self._promised_ms

    @property
    def state(self) -> m.WorkerState:
        if self.leaving.draining:
            return "draining"
        return "ready" if self.engine.is_ready else "starting"

    # --- the engine ----------------------------------------------------------------------------------

    def _on_ready(self, ready: e.EngineReady, now_ms: int) -> None:
        if not self.engine.on_ready(ready, now_ms):
            return
        self._out.append(Log(f"engine: ready, {ready.slots} slots, {', '.join(model.name for model in ready.models)}"))
        for link in self.links.values():
            link.beats.now()
        self._say_ready()

    def _on_refused(self, key: bytes, error: ErrorInfo, final: bool) -> None:
        run = self.runs.get(key)
        if run is not None and run.state is RunState.STARTING:
            self.runs.drop(run)
            self._reject(run.link, run.id, run.dispatch, error, final)

    def _lose_runs(self, text: str, *, outside: bool = False) -> None:
        self.delivery.lose(text, self.engine.heard_ms, outside=outside)
        for link in self.links.values():
            link.beats.now()

    # --- the broker ----------------------------------------------------------------------------------

    def _on_control(self, event: e.ControlArrived, now_ms: int) -> None:
        number, link = event.link, self.links[event.link]
        for message, blob in event.messages:
            if isinstance(message, m.Welcome):
                self._on_welcome(number, message, now_ms)
            elif link.on_control(event.session, now_ms):
                self._on_message(number, message, blob, now_ms)

    def _on_welcome(self, number: int, welcome: m.Welcome, now_ms: int) -> None:
        if self.links[number].on_welcome(welcome, now_ms):
            self._seq[number] = 0
            self.orphans.on_welcome(number, now_ms)

    def _on_message(self, number: int, message: m.Message, blob: bytes, now_ms: int) -> None:
        link = self.links[number]
        match message:
            case m.BrokerHeartbeat():
                self._seq[number] = max(self._seq[number], message.seq)
                link.on_proof(message.echo, now_ms)
                link.on_missing(link.beats.number - message.echo, now_ms)
            case m.Dispatch():
                self._on_dispatch(number, message, blob, now_ms)
            case m.Adopt():
                self._seq[number] = max(self._seq[number], message.seq)
                self.orphans.adopt(number, message, now_ms)
                link.beats.now()
            case m.EndAck():
                self.delivery.on_ack(number, message)
            case m.Replay():
                self.delivery.on_replay(number, message)
            case m.Cancel():
                self.delivery.on_cancel(number, message, now_ms)
            case m.Drain():
                self._tell_all(self.leaving.ordered(message))
            case m.Problem():
                self._on_problem(number, message, now_ms)
            case m.Goodbye():
                self._refused(number, f"the broker left: {message.reason or 'goodbye'}", now_ms)
            case _:
                self._out.append(Log(f"a {type(message).__name__} makes no sense for a worker", warning=True))

    def _on_dispatch(self, number: int, dispatch: m.Dispatch, blob: bytes, now_ms: int) -> None:
        self._seq[number] = max(self._seq[number], dispatch.seq)
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
            self.links[number].beats.soon(now_ms)  # with how much it can take
            return
        if self.runs.active == 0:
            self.engine.on_word(now_ms)
        deadline_at = now_ms + dispatch.deadline_ms if dispatch.deadline_ms else 0
        self.runs.add(
            Run(
                key,
                number,
                Tokens.of(dispatch, chunks),
                dispatch,
                prompt,
                deadline_at,
                published=dispatch.task == "generate",
                given_at=now_ms,
            )
        )
        self._out.append(StartRun(start))
        self.links[number].send(m.Accept(dispatch.id, dispatch.dispatch))

    def _admit(self, dispatch: m.Dispatch, prompt: bytes) -> Start | ErrorInfo:
        """What to tell the engine, or why it cannot be taken."""
        ready = self.engine.ready
        if self.leaving.draining:
            return ErrorInfo(Code.BUSY, "this worker is draining")
        if ready is None or not self.engine.is_ready:
            return ErrorInfo(Code.BUSY, "the engine is starting")
        if dispatch.suspect is not None and self.runs.suspects():
            return ErrorInfo(Code.BUSY, "another suspect is aboard")
        if self.runs.active >= ready.slots:
            return ErrorInfo(Code.BUSY, f"all {ready.slots} slots are taken")
        if not self._introduction.serves(dispatch.model):
            return ErrorInfo(Code.UNKNOWN_MODEL, f"this worker has no model {dispatch.model!r}")
        try:
            return start_of(dispatch, prompt)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return ErrorInfo(Code.BAD_REQUEST, f"sampling options: {error}")

    def _reject(self, number: int, request: bytes, dispatch: bytes, error: ErrorInfo, final: bool) -> None:
        if self.links[number].welcomed:
            self.links[number].send(m.Reject(request, dispatch, error, final))

    def _on_problem(self, number: int, problem: m.Problem, now_ms: int) -> None:
        link, error = self.links[number], problem.error
        if link.state is LinkState.GREETING or error.code in (Code.UNKNOWN_SESSION, Code.UNAUTHORIZED):
            taken = error.code is Code.NAME_TAKEN
            self._refused(number, f"{error.text}; {TRAITS[error.code].hint}" if taken else error.text, now_ms)
        else:
            self._out.append(Log(f"the broker complains: {error.code}: {error.text}", warning=True))

    def _refused(self, number: int, text: str, now_ms: int) -> None:
        link = self.links[number]
        if link.welcomed or link.state is LinkState.GREETING:
            link.on_refused(text, now_ms)

    # --- leaving -------------------------------------------------------------------------------------

    def _tell_all(self, news: str) -> None:
        """What every broker has to know, at once."""
        if news:
            self._out.append(Log(news))
            for link in self.links.values():
                link.beats.now()

    def _leave_when_done(self, now_ms: int) -> None:
        # Without a session there is nobody to deliver to: a new one would drop these runs anyway.
        connected = any(link.welcomed for link in self.links.values())
        if len(self.runs) and connected and now_ms < self.leaving.at_ms:
            return
        text = f"stopped; {len(self.runs)} runs go on elsewhere" if len(self.runs) else "stopped, nothing left to do"
        self._leave(text, now_ms)

    def _leave(self, text: str, now_ms: int, status: int = 0) -> None:
        for link in self.links.values():
            link.leave(text[:GOODBYE_CHARS] if status else "stopped", now_ms)
        self.engine.kill()
        self.exited = True
        self._out.append(Exit(text, status))

    # --- time ----------------------------------------------------------------------------------------

    def _tick(self, now_ms: int) -> None:
        if self.leaving.at_ms != NEVER_MS:
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
                if self.runs.busy(number) != self._busy[number]:
                    link.beats.soon(now_ms)  # a slot more or less, which this broker knows nothing of
        for number, link in self.links.items():
            if now_ms >= link.next_wakeup_ms() and link.tick(now_ms):
                self._beat(number, now_ms)
            if self._telling.news(link):
                self._tell(link, now_ms)

    def _beat(self, number: int, now_ms: int) -> None:
        link = self.links[number]
        link.publish_beat()
        rate, pace = self.rate.sample(now_ms)
        news = self._introduction.news(number)
        busy = self._busy[number] = self.runs.busy(number)
        link.send(
            m.WorkerHeartbeat(
                seq=self._seq[number],
                beat=link.beats.number,
                claims=self.runs.claims(number),
                busy=busy,
                state=self.state,
                rate=rate,
                pace=pace,
                wary=self.runs.suspects(number),
                note=self.engine.note[:256],
                engine_restarts=self.engine.restarts,
                percent=self.engine.percent if self.state == "starting" else 0,
                models=news.models if news else [],
                slots=news.slots if news else 0,
                drained=self.leaving.drained,
                moving=self.leaving.moving,
            )
        )

    def _tell(self, link: LinkCore, now_ms: int) -> None:
        """Links come and go; the operator hears of it, and the supervisor when the worker is of use."""
        if not link.welcomed:
            self.orphans.on_lost(link.link, now_ms)
        self._telling.tell(link)
        if link.up:
            self._say_ready()

    def _say_ready(self) -> None:
        """Once: the engine is ready, and a broker can dispatch to it."""
        if not self.ready_said and self.engine.is_ready and any(link.up for link in self.links.values()):
            self.ready_said = True
            self._out.append(NotifyReady())

    def _hello(self, number: int) -> m.WorkerHello:
        return self._introduction.hello(number, self.links[number].attempts.greetings, self.state)
