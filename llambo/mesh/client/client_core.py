"""The core of the client: events in, actions out. No sockets, clock or chance.

It promises its user every token of a request exactly once and in order, then one end, whatever is lost on the way:

    a message may be lost      send it again, with a back-off, until the answer is here
    a token frame is missing   wait a moment, because it may be late; then ask for a replay, page by page
    the last ones are missing  heartbeats and END carry counts, so a loss is noticed without a later token
    the link is lost           submit again on the next one, with the number of tokens that are here

This file has the entry point, the link and the queries. `request_life` has the life of a request and its repair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import assert_never

from llambo.mesh.client import client_events as e
from llambo.mesh.client.client_requests import QueuePlace, ReaderWishes, Request
from llambo.mesh.client.request_life import Requests
from llambo.mesh.link.link_core import LinkCore, LinkState
from llambo.mesh.wire import limits, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.stream import Reassembly
from llambo.mesh.wire.timers import NEVER_MS, Timers

# --- Queries of a client: sent again every second until the answer is complete. Brokers may answer one twice. ---

#: A query without an answer is sent again after this time.
ASK_AGAIN_MS = 1_000


@dataclass(slots=True)
class OpenQuery:
    """A query, which is sent again until all pages of one answer have arrived in order."""

    message: m.Query | e.Order
    parts: list[bytes] = field(default_factory=list)
    size: int = 0

    def add(self, result: m.Result) -> bytes | None:
        """The whole answer, if this is its last page.

        Pages of two answers never mix: an answer begins with page 0, and pages out of order are dropped.
        """
        if result.page == 0:
            self.parts, self.size = [], 0
        if result.page != len(self.parts) or self.size + len(result.data) > limits.RESULT_BYTES:
            return None
        self.parts.append(result.data)
        self.size += len(result.data)
        return b"".join(self.parts) if len(self.parts) >= result.pages else None


class Queries:
    """An order for a worker or a model waits for the answer to the one before it, which may have to be sent again.

    Otherwise a drain that was lost once would arrive after the order that ends it.
    """

    def __init__(self, send: Callable[[m.Message], None]) -> None:
        self._send = send
        self._open: dict[int, OpenQuery] = {}
        self._timers: Timers[int] = Timers()
        #: Orders that wait for another one.
        self._held: list[int] = []

    def __len__(self) -> int:
        return len(self._open)

    def ask(self, message: m.Query | e.Order, welcomed: bool, now_ms: int) -> None:
        self._open[message.query] = OpenQuery(message)
        if welcomed:
            self._send_or_hold(message.query, now_ms)

    def on_result(self, result: m.Result) -> bytes | None:
        """The whole answer, once it has arrived."""
        question = self._open.get(result.query)
        data = None if question is None else question.add(result)
        if data is not None:
            self.forget(result.query)
        return data

    def forget(self, query: int) -> bool:
        self._timers.clear(query)
        return self._open.pop(query, None) is not None

    def give_up(self) -> list[int]:
        queries = list(self._open)
        self._open.clear()
        self.on_lost()
        return queries

    def on_lost(self) -> None:
        self._timers = Timers()

    def send_all(self, now_ms: int) -> None:
        self._held = []
        for query in self._open:
            self._send_or_hold(query, now_ms)

    def on_time(self, now_ms: int) -> None:
        if self._held:
            held, self._held = self._held, []
            for query in held:
                if query in self._open:
                    self._send_or_hold(query, now_ms)
        for query in self._timers.due(now_ms):
            self._send_query(query, now_ms)

    def next_wakeup_ms(self) -> int:
        return self._timers.next_wakeup_ms()

    def _send_or_hold(self, query: int, now_ms: int) -> None:
        if self._comes_after_another(query):
            self._held.append(query)
        else:
            self._send_query(query, now_ms)

    def _comes_after_another(self, query: int) -> bool:
        subject = _subject(self._open[query].message)
        earlier = takewhile(lambda other: other != query, self._open)
        return subject is not None and any(_subject(self._open[other].message) == subject for other in earlier)

    def _send_query(self, query: int, now_ms: int) -> None:
        self._send(self._open[query].message)
        self._timers.set(query, now_ms + ASK_AGAIN_MS)


def _subject(message: m.Message) -> tuple[str, ...] | None:
    """What an order is about. None: it is a question, and may be asked at any time."""
    match message:
        case m.DrainWorker():
            return "worker", message.worker
        case m.HoldModel():
            return "model", message.model, message.holder
        case _:
            return None


#: How long requests wait for the token plane once the control plane works. Then they are sent without it, and served by
#: replay.
TOKEN_PLANE_MS = 250


#: Problems that end a session.
_SESSION_ENDS = (Code.UNKNOWN_SESSION, Code.UNAUTHORIZED)


class ClientCore:
    """One client. `handle` is the only entry point; `next_wakeup_ms` says when it needs a Tick at the latest.

    After `give_up_ms` without a broker all requests and queries fail; 0: they wait without limit.
    """

    def __init__(self, hello: m.ClientHello | None = None, *, give_up_ms: int = 0) -> None:
        greeting = hello or m.ClientHello()
        self._out: list[e.Action] = []
        # The link appends to the same list, so that all actions stay in order.
        self.link = LinkCore(0, lambda: greeting, self._out.append)
        self.requests = Requests(self.link, self._out)
        self.counters = self.requests.counters
        #: Why there is no link; None while there is one.
        self.problem: ErrorInfo | None = None
        self._queries = Queries(self.link.send)
        self._give_up_ms = give_up_ms
        self._reported = self.link.state
        self._sessions = 0
        self._submit_at = NEVER_MS
        self._alone_since: int | None = None
        self._first_beat = 0

    def handle(self, event: e.Event, now_ms: int) -> list[e.Action]:
        match event:
            case e.TokensArrived(frames):
                self._on_tokens(frames, now_ms)
            case e.ControlArrived():
                self._on_control(event, now_ms)
            case e.ConnectionChanged(change):
                self.link.on_connection(change, now_ms)
            case e.BrokersFound(count):
                self.link.on_found(count)
            case e.Tick():
                pass
            case e.LeaveAsked(reason):
                self._leave(reason, now_ms)
            case _:
                self._on_user(event, now_ms)
        self._on_time(now_ms)
        actions = self._out[:]
        self._out.clear()
        return actions

    def next_wakeup_ms(self) -> int:
        wakeup = min(self.link.next_wakeup_ms(), self.requests.next_wakeup_ms(), self._queries.next_wakeup_ms())
        if self.requests.waiting and self.link.welcomed:
            wakeup = min(wakeup, self._submit_at)
        if self._give_up_ms and self._alone_since is not None and (self.requests.live or self._queries):
            wakeup = min(wakeup, self._alone_since + self._give_up_ms)
        return wakeup

    # --- events of the user --------------------------------------------------------------------------------------

    def _on_user(self, event: e.UserEvent, now_ms: int) -> None:
        match event:
            case e.SubmitAsked(message, prompt, follow, resume):
                deadline_at = now_ms + message.deadline_ms if message.deadline_ms else 0
                reader = ReaderWishes(wanted=follow, follow=follow)
                place = QueuePlace(before=resume)
                self.requests.begin(Request(message.id, message, prompt, deadline_at, reader, place=place))
            case e.AttachAsked(id, have, again):
                self.requests.begin(Request(id, m.Attach(id), tokens=Reassembly(have), again=again))
            case e.CancelAsked(id, drop):
                self.requests.cancel(id, drop, now_ms)
            case e.QueryAsked(query, what, argument):
                self._queries.ask(m.Query(query, what, argument), self.link.welcomed, now_ms)
            case e.CommandAsked(message):
                self._queries.ask(message, self.link.welcomed, now_ms)
            case e.ReaderLeft(bytes() as id):
                self.requests.forget(id)
            case e.ReaderLeft(int() as query):
                self._queries.forget(query)
            case e.ReaderBehind(id, at_a_time):
                self.requests.hold(id, at_a_time)
            case e.ReaderCaughtUp(id):
                self.requests.release(id, now_ms)
            case _:
                assert_never(event)  # type: ignore[arg-type]  # mypy does not see that both kinds of ReaderLeft are handled

    def _leave(self, reason: str, now_ms: int) -> None:
        if self.link.welcomed:
            self.requests.cancel_mine()
        self.link.leave(reason, now_ms)

    # --- time --------------------------------------------------------------------------------------------------

    def _on_time(self, now_ms: int) -> None:
        if now_ms >= self.link.next_wakeup_ms() and self.link.tick(now_ms):
            self.link.send(m.ClientHeartbeat(self.link.beats.number))
        if self.link.state is not self._reported:
            self._on_link_changed(now_ms)
        if not self.link.welcomed:
            self._maybe_give_up(now_ms)
            return
        self.requests.on_time(now_ms)
        self._queries.on_time(now_ms)
        if self.requests.waiting and (self.link.up or now_ms >= self._submit_at):
            self.requests.introduce_waiting(now_ms)
        self.requests.acknowledge()

    def _maybe_give_up(self, now_ms: int) -> None:
        alone_ms = 0 if self._alone_since is None else now_ms - self._alone_since
        if not self._give_up_ms or alone_ms < self._give_up_ms:
            return
        why = f": {self.problem.text}" if self.problem else ""
        error = ErrorInfo(Code.NO_BROKER, f"no broker for {alone_ms} ms{why}")
        self._fail_all(error)

    def _fail_all(self, error: ErrorInfo) -> None:
        self.requests.fail_all(error)
        self._out += [e.ReportFailure(query, error) for query in self._queries.give_up()]

    # --- the link ----------------------------------------------------------------------------------------------

    def _on_link_changed(self, now_ms: int) -> None:
        self._reported = self.link.state
        if self.link.sessions != self._sessions:
            self._sessions = self.link.sessions
            self.problem = self._alone_since = None
            self._submit_at = now_ms + TOKEN_PLANE_MS
            self._queries.send_all(now_ms)
        if not self.link.welcomed and self._alone_since is None:
            self._alone_since = now_ms
            self.requests.on_lost()
            self._queries.on_lost()
        if self.link.state is LinkState.DOWN and self.problem is None:
            code = Code.UNAUTHORIZED if self.link.attempts.denied else Code.NO_BROKER
            self.problem = ErrorInfo(code, self.link.problem)
            if self.link.attempts.denied:
                self._fail_all(self.problem)
        self._out.append(e.ReportLink(self.link.state, self.problem))

    def _refused(self, error: ErrorInfo, now_ms: int) -> None:
        if self.link.state not in (LinkState.DOWN, LinkState.CLOSED):
            self.problem = error
            if error.code is Code.UNAUTHORIZED:
                self._fail_all(error)  # no broker accepts this key
            self.link.on_refused(error.text, now_ms, again=error.code is Code.UNKNOWN_SESSION)

    # --- arrivals ----------------------------------------------------------------------------------------------

    def _on_control(self, event: e.ControlArrived, now_ms: int) -> None:
        self.counters.problems += len(event.problems)
        for message, _ in event.messages:
            if isinstance(message, m.Welcome):
                if self.link.on_welcome(message, now_ms):
                    self._first_beat = 0
            elif self.link.on_control(event.session, now_ms):
                self._on_message(message, now_ms)
            else:
                self.counters.stale_messages += 1

    def _on_message(self, message: m.Message, now_ms: int) -> None:
        match message:
            case m.BrokerHeartbeat():
                self._on_heartbeat(message, now_ms)
            case m.Accepted():
                self.requests.on_accepted(message, now_ms)
            case m.End():
                self.requests.on_end(message, now_ms)
            case m.Page():
                self.requests.on_page(message, now_ms)
            case m.Result():
                if (data := self._queries.on_result(message)) is not None:
                    self._out.append(e.DeliverResult(message.query, data))
            case m.Problem():
                self._on_problem(message, now_ms)
            case m.Goodbye(reason):
                self._refused(ErrorInfo(Code.NO_BROKER, f"the broker left: {reason}"), now_ms)
            case _:
                self.counters.problems += 1

    def _on_heartbeat(self, beat: m.BrokerHeartbeat, now_ms: int) -> None:
        # Beats may begin at any number: only those since the start of this session can be missing.
        self._first_beat = self._first_beat or beat.number
        self.link.on_missing(beat.number - max(self.link.beats.number, self._first_beat - 1), now_ms)
        self.requests.on_heartbeat(beat, now_ms)

    def _on_problem(self, problem: m.Problem, now_ms: int) -> None:
        self.counters.problems += 1
        if problem.id in self.requests.live:
            self.requests.on_problem(problem, now_ms)
        elif problem.query and self._queries.forget(problem.query):
            self._out.append(e.ReportFailure(problem.query, problem.error))
        elif problem.error.code in _SESSION_ENDS or self.link.state is LinkState.GREETING:
            self._refused(problem.error, now_ms)

    def _on_tokens(self, frames: list[bytes], now_ms: int) -> None:
        self.counters.frames += len(frames)
        chunk = tokens.CHUNK
        chunks = [frame for frame in frames if frame[:1] == chunk]
        if len(chunks) != len(frames):
            for frame in frames:
                if frame[:1] != chunk:
                    self._on_beat(frame, now_ms)
        self.requests.on_chunks(chunks, now_ms)

    def _on_beat(self, frame: bytes, now_ms: int) -> None:
        beat = tokens.decode_beat(frame)
        if beat is None:
            self.counters.malformed += 1
            return
        number, session = beat
        if self.link.welcomed and session == self.link.session and number > self.link.beats.number:
            was_up, self.link.beats.number = self.link.up, number
            self.link.on_proof(number, now_ms)
            if self.link.up and not was_up:
                self.link.beats.now()  # so that the broker learns at once that the grant works
