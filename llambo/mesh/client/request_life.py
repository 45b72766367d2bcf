"""The life of a request in its client, from submit to end: the steps of CLIENT_STEPS.

One alarm for each request is enough. While the request is submitted it means "send it again", while it runs or ends
"look for missing tokens", while it is being cancelled "send the cancel again".
"""

from __future__ import annotations

from collections.abc import Sequence

from llambo.mesh.client import client_events as e
from llambo.mesh.client.client_requests import Counters, ReaderWishes, Request, RequestState
from llambo.mesh.link.link_core import LinkCore
from llambo.mesh.wire import limits, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.naming import is_fake
from llambo.mesh.wire.stream import Reassembly
from llambo.mesh.wire.timers import Timers

# --- When a client requests tokens again, and which. ---
#
# A token is known to exist from a later one (a gap), from a heartbeat (progress), from a page (total) or from END
# (count). If it has not arrived a moment later, a replay of the first gap is requested. To request seldom, and exactly
# what is missing, avoids duplicates: with separate replays for each gap they were four frames for each token.

#: Frames overtake each other by a fraction of a millisecond; a gap older than this will not close by itself.
TAIL_GRACE_MS = 10
#: A replay that was requested is requested again after this time.
REPLAY_AGAIN_MS = 500


class Repair:
    def __init__(self, link: LinkCore, timers: Timers[bytes], counters: Counters) -> None:
        self._link = link
        self._timers = timers
        self._counters = counters

    def wait_for(self, request: Request, until: int, now_ms: int) -> None:
        """Tokens before `until` exist. If they have not arrived in a moment, request them."""
        request.repair.known = max(request.repair.known, until)
        if not request.repair.target and request.repairable and request.missing_until:
            request.repair.target = request.repair.known
            # Without a token plane none are on their way.
            self._timers.set(request.id, now_ms + (TAIL_GRACE_MS if self._link.up else 0))

    def wait_for_replay(self, request: Request, until: int, now_ms: int) -> None:
        """As if a replay had been requested just now: look again when it should have arrived."""
        request.repair.known = max(request.repair.known, until)
        request.repair.target = request.repair.asked_until = until
        request.repair.asked_first = request.tokens.next_index
        self._timers.set(request.id, now_ms + REPLAY_AGAIN_MS)

    def request_replay(self, request: Request, now_ms: int) -> None:
        if not request.repairable or not request.missing_until:
            return
        self._counters.replays += 1
        first = request.tokens.next_index
        until = min(request.missing_until, first + request.reader.at_a_time)
        self._link.send(m.Replay(request.id, first, until))
        self.wait_for_replay(request, until, now_ms)

    def on_alarm(self, request: Request, now_ms: int) -> None:
        late = request.tokens.next_index < request.repair.target
        request.repair.forget()
        if late:
            self.request_replay(request, now_ms)
        else:
            # They arrived by themselves; later ones may be missing.
            self.wait_for(request, 0, now_ms)

    def on_page(self, request: Request, page: m.Page, now_ms: int) -> None:
        """A page has been added: go on with the rest of the replay."""
        asked_first, asked_until = request.repair.asked_first, request.repair.asked_until
        request.repair.forget()
        if not request.repairable or not request.missing_until:
            return
        if request.tokens.next_index == asked_first:
            # The page was empty: the broker waits for these tokens as well.
            self.wait_for_replay(request, request.repair.known, now_ms)
        elif page.next < asked_until:
            self.request_replay(request, now_ms)
        else:
            self.wait_for(request, 0, now_ms)


#: The pause before a message without an answer is sent again; for submits it doubles, from the first to the second.
RESEND_MS = (500, 4_000)

#: For requests without logprobs, which are nearly all.
NO_LOGPROBS: Sequence[tokens.Logprob | None] = ()

_ID_END = 1 + limits.REQUEST_ID_BYTES


class Requests:
    """The live requests by id. Messages go to the link, deliveries to `out`."""

    def __init__(self, link: LinkCore, out: list[e.Action]) -> None:
        self.live: dict[bytes, Request] = {}
        self.waiting: dict[bytes, Request] = {}
        self.counters = Counters()
        self._link = link
        self._out = out
        self._acks: list[bytes] = []
        #: The requests that the last heartbeat had a note for.
        self._noted: set[bytes] = set()
        self._timers: Timers[bytes] = Timers()
        self._repair = Repair(link, self._timers, self.counters)

    # --- time and the link -----------------------------------------------------------------------------------

    def next_wakeup_ms(self) -> int:
        return self._timers.next_wakeup_ms()

    def on_time(self, now_ms: int) -> None:
        for id in self._timers.due(now_ms):
            self._on_alarm(self.live[id], now_ms)

    def _on_alarm(self, request: Request, now_ms: int) -> None:
        match request.state:
            case RequestState.SUBMITTED:
                self.counters.resends += 1
                self._introduce(request, now_ms)
            case RequestState.CANCELLING:
                self.counters.resends += 1
                self._send_cancel(request, now_ms)
            case _:
                self._repair.on_alarm(request, now_ms)

    def on_lost(self) -> None:
        """The link is lost: everything is sent again on the next one."""
        self._acks.clear()
        for request in self.live.values():
            if request.state is not RequestState.WAITING:
                request.enter(RequestState.WAITING)
            request.end, request.tries, request.asked_at = None, 0, 0
            request.repair.forget()
            # The next broker may not know this answer, and continue it in another way.
            request.repair.known = 0
            request.tokens.forget_stash()
            if request.whole or not request.place.known:  # nothing of it has been delivered
                request.tokens = Reassembly(request.tokens.base)
            if request.tokens.next_index == request.tokens.base:  # so the next broker may begin it with another file
                request.place.known = False
            self._timers.clear(request.id)
            self.waiting[request.id] = request

    def introduce_waiting(self, now_ms: int) -> None:
        waiting, self.waiting = self.waiting, {}
        for request in waiting.values():
            self._introduce(request, now_ms)

    def acknowledge(self) -> None:
        """Acknowledge all ENDs of this round together."""
        for start in range(0, len(self._acks), limits.PAGE_CHUNKS):
            self._link.send(m.EndAck(self._acks[start : start + limits.PAGE_CHUNKS]))
        self.counters.end_acks += len(self._acks)
        self._acks.clear()

    def fail_all(self, error: ErrorInfo) -> None:
        for request in list(self.live.values()):
            self._fail(request, error)

    # --- calls of the user ----------------------------------------------------------------------------------

    def begin(self, request: Request) -> None:
        assert request.id not in self.live, "this client already follows that request"
        self.live[request.id] = self.waiting[request.id] = request

    def cancel(self, id: bytes, drop: bool, now_ms: int) -> None:
        request = self.live.get(id)
        if request is None:
            self.begin(Request(id, None, reader=ReaderWishes(wanted=False), cancelled=True))
            return
        request.cancelled = True
        request.reader.wanted = request.reader.wanted and not drop
        match request.state:
            case RequestState.WAITING if not request.sent and request.mine:
                self._finish(request, m.End(id, request.tokens.next_index, "cancelled"))
            case RequestState.SUBMITTED | RequestState.RUNNING:
                self._send_cancel(request, now_ms)
            case _:
                self._settle(request, now_ms)

    def forget(self, id: bytes) -> None:
        if (request := self.live.get(id)) is not None:
            self._detach(request)

    def hold(self, id: bytes, at_a_time: int) -> None:
        if (request := self.live.get(id)) is not None:
            request.reader.held, request.reader.at_a_time = True, at_a_time
            request.repair.forget()

    def release(self, id: bytes, now_ms: int) -> None:
        if (request := self.live.get(id)) is not None and request.reader.held:
            request.reader.held = False
            self._repair.request_replay(request, now_ms)

    def cancel_mine(self) -> None:
        """Before the client disconnects: its answers will not be read."""
        for request in self.live.values():
            if request.mine and not request.detached and request.state is not RequestState.WAITING:
                self._link.send(m.Cancel(request.id))

    # --- messages of the broker ----------------------------------------------------------------------------------

    def on_heartbeat(self, beat: m.BrokerHeartbeat, now_ms: int) -> None:
        for id, next_index in beat.progress.items():
            if (request := self.live.get(id)) is None:
                self._link.send(m.Detach(id))  # the first one was lost; without it the request might run for no client
            elif next_index > request.tokens.next_index:
                self._repair.wait_for(request, next_index, now_ms)
        for id, ahead in beat.waiting.items():
            if (request := self.live.get(id)) is not None:
                self._place(request, ahead)
        if beat.notes or self._noted:
            self._report_notes(beat.notes)

    def _report_notes(self, notes: dict[bytes, str]) -> None:
        """Each change; a request without a note has no more to say than its place, or does not wait any more."""
        for id in {*notes, *self._noted}:
            request, note = self.live.get(id), notes.get(id, "")
            if request is not None and note != request.place.note:
                request.place.note = note
                self._out.append(e.ReportNote(id, note))
        self._noted = set(notes)

    def on_accepted(self, accepted: m.Accepted, now_ms: int) -> None:
        request = self.live.get(accepted.id)
        if request is None or request.state is RequestState.WAITING:
            return
        request.place.model = accepted.model or request.place.model
        request.place.proof = accepted.proof or request.place.proof
        before, request.place.fingerprint = request.place.fingerprint, accepted.fingerprint or request.place.fingerprint
        # (Without a fingerprint: it is not running yet, or, if tokens were here when this was asked, it has none.)
        request.place.known = request.place.known or bool(accepted.fingerprint or request.asked_at)
        self._place(request, accepted.ahead, found=is_fake(request.place.fingerprint) != is_fake(before))
        if request.state is RequestState.SUBMITTED:
            if not request.reader.follow:
                self._detach(request)
                return
            request.enter(RequestState.RUNNING)
            self._timers.clear(request.id)
            self._repair.wait_for(request, request.tokens.seen_index, now_ms)
        self._settle(request, now_ms)

    def on_end(self, end: m.End, now_ms: int) -> None:
        request = self.live.get(end.id)
        if request is None:
            # It has ended here, or was dropped: the broker need not send the END again.
            self._acks.append(end.id)
            return
        if request.state is RequestState.WAITING:
            return  # it has not been sent on this link yet; when it is, the broker answers again
        request.end = end
        if request.complete:
            self._settle(request, now_ms)  # of a result nothing has been delivered yet
            return
        if request.state is not RequestState.ENDING:
            request.enter(RequestState.ENDING)
            request.repair.forget()
            self._timers.clear(end.id)
        if request.streams:
            self._repair.wait_for(request, end.count, now_ms)
        elif self._link.terms.pull and not request.repair.target and not request.reader.held:
            request.repair.known = max(request.repair.known, end.count)
            self._repair.request_replay(request, now_ms)
        elif not request.repair.target and not request.reader.held:
            # Its first page follows this message.
            self._repair.wait_for_replay(request, end.count, now_ms)

    def on_page(self, page: m.Page, now_ms: int) -> None:
        request = self.live.get(page.id)
        if request is None:
            return
        self.counters.pages += 1
        request.repair.known = max(request.repair.known, page.total)
        if request.reader.held:
            return
        for chunk in page.chunks:
            if chunk[1:_ID_END] == page.id:
                request.tokens.add(chunk)
            else:
                self.counters.malformed += 1
        self._settle(request, now_ms)
        if request.state is not RequestState.DONE:
            self._repair.on_page(request, page, now_ms)

    def on_problem(self, problem: m.Problem, now_ms: int) -> None:
        request = self.live[problem.id]
        if request.state is RequestState.CANCELLING and request.mine and problem.error.code is Code.UNKNOWN_REQUEST:
            # The submit was lost and the cancel arrived: the request never ran.
            self._finish(request, m.End(request.id, request.tokens.next_index, "cancelled"))
        elif request.again and request.state is RequestState.SUBMITTED and problem.error.code is Code.UNKNOWN_REQUEST:
            # It waited, or had ended, at a broker that is gone. This client has submitted it, and does so again.
            (request.message, request.prompt), request.again = request.again, None
            self._introduce(request, now_ms)
        else:
            self._fail(request, problem.error)

    def on_chunks(self, frames: list[bytes], now_ms: int) -> None:
        """The hot path: add the chunks of one read to their requests, then deliver once for each request."""
        live, waiting = self.live, RequestState.WAITING
        touched: dict[bytes, Request] = {}
        for frame in frames:
            id = frame[1:_ID_END]
            request = live.get(id)
            if request is None:
                self.counters.stray_frames += 1
            elif request.state is waiting:
                self.counters.stray_frames += 1  # of a lost link: the answer may continue in another way on the next
            elif request.reader.held:
                self._leave_out(request, frame)
            else:
                request.tokens.add(frame)
                touched[id] = request
        for request in touched.values():
            self._settle(request, now_ms)

    # --- inside --------------------------------------------------------------------------------------------------

    def _introduce(self, request: Request, now_ms: int) -> None:
        """Introduce the request to the broker, and send its cancel as well if it is cancelled."""
        if request.state is RequestState.WAITING:
            request.enter(RequestState.SUBMITTED)
        request.sent = True
        message, blob = request.introduction(now_ms)
        if message is not None:
            self._link.send(message, blob)
            self._timers.set(request.id, now_ms + min(RESEND_MS[0] << request.tries, RESEND_MS[1]))
            request.tries = min(request.tries + 1, 8)
        if request.cancelled:
            self._send_cancel(request, now_ms)

    def _send_cancel(self, request: Request, now_ms: int) -> None:
        if request.state is not RequestState.CANCELLING:
            request.enter(RequestState.CANCELLING)
            request.repair.forget()
        self._link.send(m.Cancel(request.id))
        self._timers.set(request.id, now_ms + RESEND_MS[0])

    def _place(self, request: Request, ahead: int, *, found: bool = False) -> None:
        """`found`: it is known now whether the model is a fake one."""
        place = request.place
        if ahead != place.ahead or found:
            place.ahead = ahead
            self._out.append(e.ReportPlace(request.id, ahead, place.model, is_fake(place.fingerprint)))

    def _leave_out(self, request: Request, frame: bytes) -> None:
        self.counters.held_frames += 1
        if len(frame) > tokens.HEAD_BYTES:
            first, count, _ = tokens.head(frame, tokens.KEY_END)
            request.repair.known = max(request.repair.known, first + count)

    def _settle(self, request: Request, now_ms: int) -> None:
        """Deliver the tokens that are in order. Then end the request if it is complete, or look after a gap."""
        ids, pieces = request.tokens.take() if request.deliverable else ([], [])
        if ids and request.reader.wanted:
            logprobs = request.tokens.take_logprobs(len(ids)) if request.tokens.logprobs else NO_LOGPROBS
            self._out.append(e.DeliverTokens(request.id, ids, pieces, logprobs))
        if request.end is not None and request.complete:
            self._finish(request, request.end)
        elif request.tokens.stash:
            self._repair.wait_for(request, request.tokens.seen_index, now_ms)
        if not request.place.known and request.state is RequestState.RUNNING:
            self._ask_which_file(request, now_ms)

    def _ask_which_file(self, request: Request, now_ms: int) -> None:
        """Tokens are here, and the message that says which file they are of was lost: the answer to a submit has it."""
        wanted = request.reader.wanted and not request.whole and request.tokens.next_index > request.tokens.base
        if wanted and (not request.asked_at or now_ms - request.asked_at >= RESEND_MS[0]):
            self.counters.resends += 1
            request.asked_at = now_ms
            message, blob = request.introduction(now_ms)
            if message is not None:
                self._link.send(message, blob)

    def _finish(self, request: Request, end: m.End) -> None:
        if request.end is not None:
            self._acks.append(request.id)
        self._drop(request)
        self._out.append(e.ReportEnd(request.id, end))

    def _fail(self, request: Request, error: ErrorInfo) -> None:
        self._drop(request)
        self._out.append(e.ReportFailure(request.id, error))

    def _detach(self, request: Request) -> None:
        """Stop following. If this message is lost, tokens still arrive and are ignored, and the END is acknowledged."""
        if request.sent and self._link.welcomed:
            self._link.send(m.Detach(request.id))
        self._drop(request)

    def _drop(self, request: Request) -> None:
        request.enter(RequestState.DONE)
        self._timers.clear(request.id)
        self.waiting.pop(request.id, None)
        del self.live[request.id]
