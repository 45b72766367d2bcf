"""The client core alone: no sockets, and time is a number."""

from __future__ import annotations

import msgpack
import pytest

from llambo.mesh.client import client_events as e
from llambo.mesh.client.client_core import ASK_AGAIN_MS, TOKEN_PLANE_MS, ClientCore
from llambo.mesh.client.client_requests import CLIENT_STEPS, RequestState
from llambo.mesh.client.request_life import REPLAY_AGAIN_MS, RESEND_MS, TAIL_GRACE_MS
from llambo.mesh.link.link_core import LinkState, OpenControl, OpenTokens, Send
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import tokens, transfer
from llambo.mesh.wire.codec import NO_SESSION
from llambo.mesh.wire.errors import Code, ErrorInfo

ID = b"i" * 16
KEY = ID + b"d" * 8
SESSIONS = [b"session1", b"session2", b"session3"]


class Bench:
    """A core with a clock; its actions are sorted into messages to the broker and all others."""

    def __init__(self, give_up_ms: int = 0) -> None:
        self.core = ClientCore(give_up_ms=give_up_ms)
        self.now = 1_000
        self.session = NO_SESSION
        self.sent: list[m.Message] = []
        self.actions: list[e.Action] = []
        self.beat = 0

    def handle(self, event: e.Event) -> list[e.Action]:
        """Returns the actions other than messages to the broker."""
        actions = self.core.handle(event, self.now)
        self.actions += actions
        self.sent += [action.message for action in actions if isinstance(action, Send)]
        return [action for action in actions if not isinstance(action, Send)]

    def sent_since(self) -> list[m.Message]:
        """What was sent since the last look, without beats."""
        sent, self.sent = self.sent, []
        return [message for message in sent if not isinstance(message, m.ClientHeartbeat | m.ClientHello)]

    def receive(self, *messages: m.Message) -> list[e.Action]:
        return self.handle(e.ControlArrived(self.session, [(message, b"") for message in messages], []))

    def tokens(self, first: int, count: int = 1, id: bytes = ID) -> list[e.Action]:
        return self.handle(e.TokensArrived([chunk(first, count, id)]))

    def heartbeat(self, progress: int = 0, on_tokens: bool = True) -> list[e.Action]:
        self.beat += 1
        if on_tokens:
            self.handle(e.TokensArrived([tokens.encode_beat(self.beat, self.session)]))
        return self.receive(m.BrokerHeartbeat(self.beat, progress={ID: progress} if progress else {}))

    def wait(self, ms: int, *, alive: bool = True) -> list[e.Action]:
        """Let time pass with a Tick whenever the core asks for one. `alive`: the broker keeps sending heartbeats."""
        until, happened = self.now + ms, []
        beat_at = self.now + 200
        for _ in range(10_000):
            at = min(self.core.next_wakeup_ms(), beat_at if alive else until)
            if at > until:
                break
            self.now = max(self.now, at)
            if alive and self.now >= beat_at:
                beat_at += 200
                happened += self.heartbeat()
            happened += self.handle(e.Tick())
            if not alive and self.now >= until:
                break
        else:
            pytest.fail("the core asks for one Tick after another")
        self.now = until
        return happened

    def welcome(self, number: int = 0) -> list[e.Action]:
        self.handle(e.Tick())
        self.session, self.beat = SESSIONS[number], 0
        welcome = m.Welcome(self.session, 7333, b"t" * 16, lease_ms=1_000)
        return self.handle(e.ControlArrived(NO_SESSION, [(welcome, b"")], []))

    def up(self, number: int = 0) -> Bench:
        self.welcome(number)
        self.heartbeat()
        assert self.core.link.state is LinkState.UP
        self.sent.clear()
        return self

    def lose(self) -> None:
        """The broker leaves, and for half a second there is none."""
        self.receive(m.Goodbye("restart"))
        self.wait(500, alive=False)

    def submit(self, **fields: object) -> None:
        self.handle(e.SubmitAsked(m.InferenceRequest(ID, **fields), b"prompt"))  # type: ignore[arg-type]

    def run(self) -> None:
        """Until a request is running."""
        self.up().submit()
        self.receive(m.Accepted(ID, fingerprint="f00d"))
        self.sent.clear()

    def step(self) -> RequestState:
        return self.core.requests.live[ID].state


def chunk(first: int, count: int = 1, id: bytes = ID) -> bytes:
    ids = list(range(first, first + count))
    return tokens.encode_chunk(id + b"d" * 8, first, ids, [b"x"] * count)


def page(first: int, after: int, total: int) -> m.Page:
    return m.Page(ID, first, after, total, [chunk(first, after - first)] if after > first else [])


def delivered(actions: list[e.Action]) -> list[int]:
    return [id for action in actions if isinstance(action, e.DeliverTokens) for id in action.ids]


@pytest.fixture
def bench() -> Bench:
    return Bench()


class TestJoining:
    def test_says_hello_on_fresh_sockets_at_once(self, bench: Bench) -> None:
        assert bench.handle(e.Tick()) == [OpenControl(0), e.ReportLink(LinkState.GREETING)]
        assert isinstance(bench.sent[0], m.ClientHello)

    def test_subscribes_where_the_welcome_says_and_is_up_with_the_first_beat(self, bench: Bench) -> None:
        assert OpenTokens(0, 7333, b"t" * 16) in bench.welcome()
        assert bench.heartbeat() == []
        assert e.ReportLink(LinkState.UP) in bench.actions
        assert bench.sent[-1] == m.ClientHeartbeat(1)

    def test_a_beat_of_another_session_proves_nothing(self, bench: Bench) -> None:
        bench.welcome()
        bench.handle(e.TokensArrived([tokens.encode_beat(1, b"another!"), b"B", b"junk"]))
        assert bench.core.link.state is LinkState.JOINING
        assert bench.core.counters.malformed == 2

    def test_beats_that_began_long_ago_do_not_count_as_missing(self, bench: Bench) -> None:
        # Given a broker whose beats do not begin at 1
        bench.welcome()
        bench.beat = 5_000
        # When three of them arrive on the control plane only
        for _ in range(3):
            bench.heartbeat(on_tokens=False)
        # Then the token plane is waited for; with the fourth it is reconnected
        assert bench.core.link.state is LinkState.JOINING
        bench.heartbeat(on_tokens=False)
        assert bench.core.link.state is LinkState.MENDING

    def test_a_refusal_is_reported(self, bench: Bench) -> None:
        bench.handle(e.Tick())
        error = ErrorInfo(Code.BAD_VERSION, "too old")
        assert e.ReportLink(LinkState.DOWN, error) in bench.receive(m.Problem(error))

    def test_a_silent_broker_takes_the_link_down(self, bench: Bench) -> None:
        bench.up()
        happened = bench.wait(1_500, alive=False)
        states = [action.state for action in happened if isinstance(action, e.ReportLink)]
        assert states[:2] == [LinkState.DOWN, LinkState.GREETING]

    def test_leaving_cancels_what_runs_and_says_goodbye(self, bench: Bench) -> None:
        bench.run()
        bench.handle(e.LeaveAsked("bye"))
        assert bench.sent_since() == [m.Cancel(ID), m.Goodbye("bye")]


class TestSubmitting:
    def test_waits_for_the_link(self, bench: Bench) -> None:
        # Given a request made before anything is connected
        bench.submit()
        bench.welcome()
        assert bench.sent_since() == []
        # When the first beat arrives on the token plane
        bench.heartbeat()
        # Then it is sent
        assert bench.sent_since() == [m.InferenceRequest(ID)]
        assert bench.step() is RequestState.SUBMITTED

    def test_goes_without_a_token_plane_after_a_while(self, bench: Bench) -> None:
        bench.submit()
        bench.welcome()
        bench.wait(TOKEN_PLANE_MS - 1, alive=False)
        assert bench.sent_since() == []
        bench.wait(1, alive=False)
        assert bench.sent_since() == [m.InferenceRequest(ID)]

    def test_brings_its_prompt(self, bench: Bench) -> None:
        bench.up().submit()
        sent = [action for action in bench.actions if isinstance(action, Send)][-1]
        assert (sent.session, sent.blob) == (bench.session, b"prompt")

    def test_is_sent_again_until_it_is_accepted(self, bench: Bench) -> None:
        bench.up().submit()
        assert len(bench.sent_since()) == 1
        bench.wait(RESEND_MS[0])
        assert len(bench.sent_since()) == 1
        bench.wait(2 * RESEND_MS[0] - 1)
        assert bench.sent_since() == []
        bench.wait(1)
        assert len(bench.sent_since()) == 1
        assert bench.receive(m.Accepted(ID, 3, "tiny")) == [e.ReportPlace(ID, 3, "tiny")]
        bench.wait(10_000)
        assert bench.sent_since() == []

    def test_its_place_in_the_queue_is_reported_when_it_changes(self, bench: Bench) -> None:
        bench.up().submit()
        bench.receive(m.Accepted(ID, 3, "tiny"))
        assert bench.receive(m.BrokerHeartbeat(2, waiting={ID: 3})) == []
        assert bench.receive(m.BrokerHeartbeat(3, waiting={ID: 1})) == [e.ReportPlace(ID, 1, "tiny")]

    def test_why_it_waits_is_reported_when_it_changes(self, bench: Bench) -> None:
        bench.up().submit()
        bench.receive(m.Accepted(ID, 0, "tiny"))
        loading = m.BrokerHeartbeat(2, waiting={ID: 0}, notes={ID: "loading tiny on box, 41 %"})
        assert bench.receive(loading) == [e.ReportNote(ID, "loading tiny on box, 41 %")]
        assert bench.receive(loading) == []
        assert bench.receive(m.BrokerHeartbeat(3, notes={b"?" * 16: "of another"})) == [e.ReportNote(ID, "")]

    def test_a_request_that_a_heartbeat_lists_was_admitted_and_is_resumed_elsewhere(self, bench: Bench) -> None:
        # Given a request whose acceptance is lost with the link, after a heartbeat has listed it
        bench.up().submit()
        bench.receive(m.BrokerHeartbeat(2, waiting={ID: 3}))
        bench.lose()
        # Then the next broker does not judge it as new
        bench.up(1)
        bench.handle(e.Tick())
        again = [a.message for a in bench.actions if isinstance(a, Send) and isinstance(a.message, m.InferenceRequest)]
        assert [message.resume for message in again][-1] is True

    def test_a_problem_ends_it(self, bench: Bench) -> None:
        bench.up().submit()
        error = ErrorInfo(Code.BUSY, "full", 100)
        assert bench.receive(m.Problem(error, ID)) == [e.ReportFailure(ID, error)]
        bench.wait(5_000)
        assert len(bench.sent_since()) == 1

    def test_a_lost_link_means_submitting_again_with_what_is_held_and_the_time_left(self, bench: Bench) -> None:
        # Given a stream with three tokens
        bench.up().submit(deadline_ms=60_000)
        bench.receive(m.Accepted(ID, 0, "tiny", "f00d", b"proof"))
        bench.tokens(0, 3)
        bench.tokens(4, 1)
        bench.sent.clear()
        # When the broker does not know the session any more
        started = bench.now
        bench.receive(m.Problem(ErrorInfo(Code.UNKNOWN_SESSION, "who?")))
        assert bench.step() is RequestState.WAITING
        bench.wait(500, alive=False)
        bench.up(1)
        # Then the request was sent on the new session
        sent = [a for a in bench.actions if isinstance(a, Send) and isinstance(a.message, m.InferenceRequest)][-1]
        assert sent.session == SESSIONS[1]
        left = 60_000 - (bench.now - started)
        assert sent.message == m.InferenceRequest(
            ID, "tiny", deadline_ms=left, have=3, resume=True, prompt_bytes=6, fingerprint="f00d", proof=b"proof"
        )
        prompt, held = transfer.unpack(sent.blob or b"", 6)
        assert (prompt, tokens.ids_of(held)) == (b"prompt", [0, 1, 2])
        # and goes on where it was; what came early on the old link is dropped, since this broker's answer may differ
        bench.receive(m.Accepted(ID, fingerprint="f00d"))
        assert delivered(bench.tokens(2, 2)) == [3]

    def test_tokens_wait_until_it_is_known_which_file_they_are_of(self, bench: Bench) -> None:
        # Given a request that waited, and tokens whose `accepted` was lost
        bench.up().submit()
        bench.receive(m.Accepted(ID, 0, "tiny"))
        bench.sent.clear()
        assert delivered(bench.tokens(0, 2)) == []
        # Then the broker is asked again, but not with each token
        assert delivered(bench.tokens(2)) == []
        (again,) = bench.sent_since()
        assert isinstance(again, m.InferenceRequest) and again.resume and again.have == 2
        # ... and with its answer they are delivered
        assert delivered(bench.receive(m.Accepted(ID, 0, "tiny", "f00d"))) == [0, 1, 2]

    def test_a_model_without_a_fingerprint_is_asked_about_once(self, bench: Bench) -> None:
        bench.up().submit()
        bench.receive(m.Accepted(ID, 0, "tiny"))
        bench.tokens(0)
        assert delivered(bench.receive(m.Accepted(ID, 0, "tiny"))) == [0]
        bench.sent.clear()
        assert delivered(bench.tokens(1)) == [1]
        assert bench.sent_since() == []

    def test_what_was_not_delivered_is_not_continued_by_the_next_broker(self, bench: Bench) -> None:
        bench.up().submit()
        bench.receive(m.Accepted(ID, 0, "tiny"))
        bench.tokens(0, 2)
        bench.lose()
        bench.up(1)
        sent = [a.message for a in bench.actions if isinstance(a, Send) and isinstance(a.message, m.InferenceRequest)]
        assert (sent[-1].have, sent[-1].fingerprint) == (0, "")
        bench.receive(m.Accepted(ID, 0, "tiny", "beef"))
        assert delivered(bench.tokens(0)) == [0]

    def test_with_no_token_here_the_next_broker_may_begin_it_with_another_file(self, bench: Bench) -> None:
        bench.up().submit()
        bench.receive(m.Accepted(ID, 0, "tiny", "f00d"))
        bench.lose()
        bench.up(1)
        assert delivered(bench.tokens(0)) == []  # and the `accepted` of this broker was lost
        assert delivered(bench.receive(m.Accepted(ID, 0, "tiny", "beef"))) == [0]

    def test_an_end_is_complete_without_it(self, bench: Bench) -> None:
        bench.up().submit()
        bench.tokens(0, 2)
        assert delivered(bench.receive(m.End(ID, 2, "stop"))) == [0, 1]

    def test_what_arrives_late_on_a_lost_link_does_not_count(self, bench: Bench) -> None:
        bench.run()
        bench.tokens(0, 3)
        bench.receive(m.Goodbye("restart"))
        assert delivered(bench.tokens(3, 1)) == []

    def test_a_follower_says_what_it_holds_too(self, bench: Bench) -> None:
        bench.up()
        bench.handle(e.AttachAsked(ID))
        bench.receive(m.Accepted(ID, fingerprint="f00d"))
        bench.tokens(0, 2)
        bench.lose()
        bench.sent.clear()
        bench.up(1)
        (attach,) = [
            action.message
            for action in bench.actions
            if isinstance(action, Send) and isinstance(action.message, m.Attach)
        ][1:]
        assert attach.have == 2 and tokens.ids_of(attach.held) == [0, 1] and attach.fingerprint == "f00d"

    def test_words_of_an_earlier_session_do_not_count(self, bench: Bench) -> None:
        bench.up().submit()
        bench.session = b"earlier!"
        assert bench.receive(m.Accepted(ID)) == []
        assert bench.core.counters.stale_messages == 1

    def test_one_that_is_not_followed_is_forgotten_when_accepted(self, bench: Bench) -> None:
        bench.up()
        bench.handle(e.SubmitAsked(m.InferenceRequest(ID, detached=True), b"", follow=False))
        assert bench.receive(m.Accepted(ID, 0, "tiny")) == [e.ReportPlace(ID, 0, "tiny")]
        assert bench.core.requests.live == {}
        # Its tokens are dropped, and its end is acknowledged.
        bench.sent.clear()
        assert bench.tokens(0) == []
        assert bench.receive(m.End(ID, 1, "stop")) == []
        assert bench.sent_since() == [m.EndAck([ID])]

    def test_attaching_says_what_is_held(self, bench: Bench) -> None:
        bench.up()
        bench.handle(e.AttachAsked(ID, 7))
        assert bench.sent_since() == [m.Attach(ID, 7)]
        bench.receive(m.Accepted(ID, fingerprint="f00d"))
        assert delivered(bench.tokens(7)) == [7]

    def test_what_was_submitted_from_here_is_submitted_again_where_it_is_unknown(self, bench: Bench) -> None:
        bench.up()
        request = m.InferenceRequest(ID, "m", detached=True)
        bench.handle(e.AttachAsked(ID, again=(request, b"prompt")))
        assert bench.sent_since() == [m.Attach(ID)]
        bench.sent.clear()
        unknown = m.Problem(ErrorInfo(Code.UNKNOWN_REQUEST, "it is not known"), ID)
        assert bench.receive(unknown) == []
        assert bench.sent_since() == [request]
        # And if that is refused too, it fails.
        failed = bench.receive(unknown)
        assert [action.key for action in failed if isinstance(action, e.ReportFailure)] == [ID]

    def test_fails_when_there_is_no_broker_for_too_long(self) -> None:
        bench = Bench(give_up_ms=3_000)
        bench.submit()
        bench.handle(e.QueryAsked(5, "status"))
        assert not any(isinstance(action, e.ReportFailure) for action in bench.wait(2_999, alive=False))
        failed = [action for action in bench.wait(1, alive=False) if isinstance(action, e.ReportFailure)]
        assert [action.key for action in failed] == [ID, 5]
        assert {action.error.code for action in failed} == {Code.NO_BROKER}


class TestTokens:
    def test_the_frames_of_a_drain_are_delivered_at_once(self, bench: Bench) -> None:
        bench.run()
        happened = bench.handle(e.TokensArrived([chunk(0), chunk(1, 2), chunk(3)]))
        assert happened == [e.DeliverTokens(ID, [0, 1, 2, 3], [b"x"] * 4)]

    def test_the_end_comes_after_the_last_token_and_is_acknowledged(self, bench: Bench) -> None:
        bench.run()
        end = m.End(ID, 2, "stop")
        assert bench.receive(end) == []
        assert bench.step() is RequestState.ENDING
        assert bench.sent_since() == []
        assert bench.tokens(0, 2) == [e.DeliverTokens(ID, [0, 1], [b"x"] * 2), e.ReportEnd(ID, end)]
        assert bench.sent_since() == [m.EndAck([ID])]

    def test_every_repeated_end_is_acknowledged_again(self, bench: Bench) -> None:
        bench.run()
        bench.receive(m.End(ID, 0, "stop"))
        bench.sent.clear()
        assert bench.receive(m.End(ID, 0, "stop"), m.End(b"?" * 16, 4, "stop")) == []
        assert bench.sent_since() == [m.EndAck([ID, b"?" * 16])]

    def test_strangers_and_junk_are_counted(self, bench: Bench) -> None:
        bench.run()
        assert bench.handle(e.TokensArrived([chunk(0, id=b"?" * 16), b"", b"T", b"Z" * 50])) == []
        assert bench.core.counters.stray_frames == 2
        assert bench.core.counters.malformed == 2


class TestRepair:
    def test_a_gap_that_closes_by_itself_costs_nothing(self, bench: Bench) -> None:
        bench.run()
        bench.tokens(1)
        bench.wait(TAIL_GRACE_MS - 1)
        assert delivered(bench.tokens(0)) == [0, 1]
        bench.wait(1_000)
        assert bench.sent_since() == []

    def test_a_gap_that_stays_is_asked_for_exactly(self, bench: Bench) -> None:
        bench.run()
        bench.tokens(0)
        bench.handle(e.TokensArrived([chunk(5), chunk(6)]))
        bench.wait(TAIL_GRACE_MS)
        assert bench.sent_since() == [m.Replay(ID, 1, 5)]
        assert delivered(bench.receive(page(1, 5, 7))) == [1, 2, 3, 4, 5, 6]
        bench.wait(1_000)
        assert bench.sent_since() == []

    def test_a_replay_without_an_answer_is_asked_for_again(self, bench: Bench) -> None:
        bench.run()
        bench.tokens(3)
        bench.wait(TAIL_GRACE_MS)
        bench.wait(REPLAY_AGAIN_MS - 1)
        assert bench.sent_since() == [m.Replay(ID, 0, 3)]
        bench.wait(1)
        assert bench.sent_since() == [m.Replay(ID, 0, 3)]

    def test_the_next_page_is_pulled_at_once(self, bench: Bench) -> None:
        bench.run()
        bench.receive(m.End(ID, 30, "length"))
        bench.wait(TAIL_GRACE_MS)
        assert bench.sent_since() == [m.Replay(ID, 0, 30)]
        bench.receive(page(0, 10, 30))
        assert bench.sent_since() == [m.Replay(ID, 10, 30)]
        bench.receive(page(10, 20, 30))
        assert bench.sent_since() == [m.Replay(ID, 20, 30)]
        assert isinstance(bench.receive(page(20, 30, 30))[-1], e.ReportEnd)

    def test_a_page_that_brings_nothing_is_not_asked_for_in_a_hurry(self, bench: Bench) -> None:
        # Given a broker that misses the same tokens
        bench.run()
        bench.receive(m.End(ID, 5, "stop"))
        bench.wait(TAIL_GRACE_MS)
        bench.sent.clear()
        # When it has nothing to give
        bench.receive(m.Page(ID, 0, 0, 0, []))
        assert bench.sent_since() == []
        # Then it is asked again later
        bench.wait(REPLAY_AGAIN_MS)
        assert bench.sent_since() == [m.Replay(ID, 0, 5)]

    def test_a_silent_loss_is_noticed_by_the_beat(self, bench: Bench) -> None:
        bench.run()
        bench.tokens(0)
        bench.heartbeat(progress=4)
        assert bench.sent_since() == []
        bench.wait(TAIL_GRACE_MS)
        assert bench.sent_since() == [m.Replay(ID, 1, 4)]

    def test_a_beat_that_is_a_little_ahead_costs_nothing(self, bench: Bench) -> None:
        bench.run()
        bench.heartbeat(progress=2)
        bench.tokens(0, 2)
        bench.wait(1_000)
        assert bench.sent_since() == []

    def test_a_token_plane_that_is_down_is_not_waited_for(self, bench: Bench) -> None:
        # Given a token plane that went silent
        bench.run()
        for _ in range(4):
            bench.heartbeat(on_tokens=False)
        assert bench.core.link.state is LinkState.MENDING
        bench.sent.clear()
        # When a heartbeat reports progress
        bench.heartbeat(progress=3, on_tokens=False)
        # Then it is fetched
        bench.wait(0, alive=False)
        assert bench.sent_since() == [m.Replay(ID, 0, 3)]
        assert delivered(bench.receive(page(0, 3, 3))) == [0, 1, 2]

    def test_nothing_is_asked_of_a_broker_that_may_not_know_the_request(self, bench: Bench) -> None:
        bench.up().submit()
        bench.sent.clear()
        bench.tokens(5)
        bench.wait(RESEND_MS[0] - 1)
        assert bench.sent_since() == []
        bench.receive(m.Accepted(ID, fingerprint="f00d"))
        bench.wait(TAIL_GRACE_MS)
        assert bench.sent_since() == [m.Replay(ID, 0, 5)]

    def test_a_foreign_chunk_in_a_page_is_refused(self, bench: Bench) -> None:
        bench.run()
        assert bench.receive(m.Page(ID, 0, 1, 1, [chunk(0, id=b"?" * 16)])) == []
        assert bench.core.counters.malformed == 1


class TestWithoutStream:
    def test_the_answer_follows_its_end(self, bench: Bench) -> None:
        # Given a request that wants no stream
        bench.up().submit(stream=False)
        bench.receive(m.Accepted(ID, fingerprint="f00d"))
        bench.sent.clear()
        bench.heartbeat(progress=10)
        bench.wait(1_000)
        assert bench.sent_since() == []
        # When its end arrives, the first page is on its way
        bench.receive(m.End(ID, 30, "stop"))
        bench.wait(TAIL_GRACE_MS)
        assert bench.sent_since() == []
        # Then the rest is pulled
        bench.receive(page(0, 20, 30))
        assert bench.sent_since() == [m.Replay(ID, 20, 30)]
        assert isinstance(bench.receive(page(20, 30, 30))[-1], e.ReportEnd)

    def test_a_lost_first_page_is_asked_for(self, bench: Bench) -> None:
        bench.up().submit(stream=False)
        bench.receive(m.Accepted(ID), m.End(ID, 3, "stop"))
        bench.sent.clear()
        bench.wait(REPLAY_AGAIN_MS)
        assert bench.sent_since() == [m.Replay(ID, 0, 3)]


class TestCancelling:
    def test_is_sent_again_until_the_end(self, bench: Bench) -> None:
        bench.run()
        bench.handle(e.CancelAsked(ID))
        assert bench.sent_since() == [m.Cancel(ID)]
        bench.wait(2 * RESEND_MS[0])
        assert bench.sent_since() == [m.Cancel(ID)] * 2
        bench.tokens(0)
        end = m.End(ID, 1, "cancelled")
        assert bench.receive(end) == [e.ReportEnd(ID, end)]

    def test_dropped_tokens_are_not_waited_for(self, bench: Bench) -> None:
        bench.run()
        bench.handle(e.CancelAsked(ID, drop=True))
        assert bench.tokens(0) == []
        end = m.End(ID, 9, "cancelled")
        assert bench.receive(end) == [e.ReportEnd(ID, end)]
        assert bench.sent_since() == [m.Cancel(ID), m.EndAck([ID])]

    def test_dropping_one_that_is_ending_ends_it(self, bench: Bench) -> None:
        bench.run()
        end = m.End(ID, 9, "stop")
        bench.receive(end)
        assert bench.handle(e.CancelAsked(ID, drop=True)) == [e.ReportEnd(ID, end)]

    def test_one_that_was_never_sent_ends_here(self, bench: Bench) -> None:
        bench.submit()
        happened = bench.handle(e.CancelAsked(ID))
        assert e.ReportEnd(ID, m.End(ID, 0, "cancelled")) in happened
        bench.up()
        assert bench.sent_since() == []

    def test_a_request_of_another_client(self, bench: Bench) -> None:
        bench.up()
        bench.handle(e.CancelAsked(ID))
        assert bench.sent_since() == [m.Cancel(ID)]
        end = m.End(ID, 5, "cancelled")
        assert bench.receive(end) == [e.ReportEnd(ID, end)]

    def test_an_unknown_request(self, bench: Bench) -> None:
        bench.up()
        bench.handle(e.CancelAsked(ID))
        error = ErrorInfo(Code.UNKNOWN_REQUEST, "?")
        assert bench.receive(m.Problem(error, ID)) == [e.ReportFailure(ID, error)]

    def test_when_only_the_cancel_arrived_it_never_ran(self, bench: Bench) -> None:
        bench.up().submit()
        bench.handle(e.CancelAsked(ID))
        happened = bench.receive(m.Problem(ErrorInfo(Code.UNKNOWN_REQUEST, "?"), ID))
        assert happened == [e.ReportEnd(ID, m.End(ID, 0, "cancelled"))]

    def test_survives_the_link(self, bench: Bench) -> None:
        bench.run()
        bench.handle(e.CancelAsked(ID))
        bench.lose()
        bench.welcome(1)
        bench.sent.clear()
        bench.heartbeat()
        assert bench.sent_since() == [m.InferenceRequest(ID, resume=True, fingerprint="f00d"), m.Cancel(ID)]


class TestSlowReader:
    def test_takes_no_more_until_the_reader_has_caught_up(self, bench: Bench) -> None:
        # Given a reader that is too far behind
        bench.run()
        bench.tokens(0, 2)
        bench.handle(e.ReaderBehind(ID))
        # When more arrives, and the end
        assert bench.handle(e.TokensArrived([chunk(2, 4), chunk(6, 4)])) == []
        assert bench.receive(m.End(ID, 10, "stop"), page(2, 10, 10)) == []
        bench.wait(2_000)
        assert bench.sent_since() == []
        # Then it is fetched when the reader has caught up
        bench.handle(e.ReaderCaughtUp(ID))
        assert bench.sent_since() == [m.Replay(ID, 2, 10)]
        happened = bench.receive(page(2, 10, 10))
        assert delivered(happened) == list(range(2, 10))
        assert isinstance(happened[-1], e.ReportEnd)

    def test_fetches_as_much_at_a_time_as_the_reader_has_room_for(self, bench: Bench) -> None:
        bench.run()
        bench.handle(e.ReaderBehind(ID, 4))
        bench.handle(e.TokensArrived([chunk(0, 10)]))
        bench.handle(e.ReaderCaughtUp(ID))
        assert bench.sent_since() == [m.Replay(ID, 0, 4)]
        assert delivered(bench.receive(page(0, 4, 10))) == list(range(4))
        bench.wait(20)
        assert bench.sent_since() == [m.Replay(ID, 4, 8)]
        assert delivered(bench.receive(page(4, 8, 10))) == list(range(4, 8))
        bench.wait(20)
        assert bench.sent_since() == [m.Replay(ID, 8, 10)]

    def test_goes_on_as_before_if_nothing_was_missed(self, bench: Bench) -> None:
        bench.run()
        bench.handle(e.ReaderBehind(ID))
        bench.handle(e.ReaderCaughtUp(ID))
        assert delivered(bench.tokens(0)) == [0]
        assert bench.sent_since() == []


class TestQuestions:
    def test_an_answer_of_several_pages_is_joined(self, bench: Bench) -> None:
        bench.up()
        bench.handle(e.QueryAsked(1, "status"))
        assert bench.sent_since() == [m.Query(1, "status")]
        data = msgpack.packb({"workers": 3})
        assert bench.receive(m.Result(1, 0, 2, data[:3])) == []
        assert bench.receive(m.Result(1, 1, 2, data[3:])) == [e.DeliverResult(1, data)]

    def test_pages_of_two_answers_never_mix(self, bench: Bench) -> None:
        bench.up()
        bench.handle(e.QueryAsked(1, "status"))
        bench.receive(m.Result(1, 0, 3, b"a"), m.Result(1, 2, 3, b"c"))
        happened = bench.receive(m.Result(1, 0, 3, b"A"), m.Result(1, 1, 3, b"B"), m.Result(1, 2, 3, b"C"))
        assert happened == [e.DeliverResult(1, b"ABC")]

    def test_orders_for_a_worker_arrive_in_the_order_they_were_given(self, bench: Bench) -> None:
        # Given a drain that is lost, and its end
        bench.up()
        drain, undo, other = m.DrainWorker(1, "w1"), m.DrainWorker(2, "w1", undo=True), m.DrainWorker(3, "w2")
        for order in (drain, undo, other):
            bench.handle(e.CommandAsked(order))
        # Then the end is sent after the answer to the drain, and an order for another worker waits for neither
        assert bench.sent_since() == [drain, other]
        bench.wait(ASK_AGAIN_MS)
        assert bench.sent_since() == [drain, other]
        bench.receive(m.Result(1, 0, 1, b""))
        assert bench.sent_since() == [undo]

    def test_orders_of_one_holder_for_a_model_arrive_in_the_order_they_were_given(self, bench: Bench) -> None:
        bench.up()
        hold, undo = m.HoldModel(1, "a", holder="x"), m.HoldModel(2, "a", holder="x", undo=True)
        others = m.HoldModel(3, "a", holder="y"), m.HoldModel(4, "b", holder="x")
        for order in (hold, undo, *others):
            bench.handle(e.CommandAsked(order))
        assert bench.sent_since() == [hold, *others]
        bench.receive(m.Result(1, 0, 1, b""))
        assert bench.sent_since() == [undo]

    def test_is_asked_again_until_it_is_answered(self, bench: Bench) -> None:
        bench.handle(e.QueryAsked(1, "why", "ab"))
        bench.up()
        bench.handle(e.CommandAsked(m.DrainWorker(2, "w1")))
        bench.sent.clear()
        bench.wait(ASK_AGAIN_MS)
        assert bench.sent_since() == [m.Query(1, "why", "ab"), m.DrainWorker(2, "w1")]
        bench.receive(m.Result(1, 0, 1, b"\xc0"))
        bench.handle(e.ReaderLeft(2))
        bench.wait(5_000)
        assert bench.sent_since() == []

    def test_a_problem_fails_it(self, bench: Bench) -> None:
        bench.up()
        bench.handle(e.QueryAsked(1, "nonsense"))
        error = ErrorInfo(Code.BAD_REQUEST, "?")
        assert bench.receive(m.Problem(error, query=1)) == [e.ReportFailure(1, error)]

    def test_is_asked_on_the_next_link(self, bench: Bench) -> None:
        bench.up()
        bench.handle(e.QueryAsked(1, "status"))
        bench.lose()
        bench.sent.clear()
        bench.welcome(1)
        assert bench.sent_since() == [m.Query(1, "status")]


def test_every_step_can_be_reached_and_left() -> None:
    reached = {step for steps in CLIENT_STEPS.values() for step in steps}
    assert reached | {RequestState.WAITING} == set(RequestState)
    assert [step for step in RequestState if not CLIENT_STEPS[step]] == [RequestState.DONE]


class TestTasks:
    """A result is handed over when all of it is here, and is never put together from two."""

    def result(self, first: int, after: int, total: int) -> m.Page:
        pieces = [b"%d" % index for index in range(first, after)]
        frame = tokens.encode_chunk(ID + b"d" * 8, first, [0] * len(pieces), pieces)
        return m.Page(ID, first, after, total, [frame])

    def run(self, bench: Bench) -> None:
        bench.up().submit(task="embed", stream=False)
        bench.receive(m.Accepted(ID, model="fake"))
        bench.sent.clear()

    def test_nothing_is_handed_over_before_the_last_page(self, bench: Bench) -> None:
        self.run(bench)
        assert bench.receive(m.End(ID, 3, "stop")) == []
        assert bench.receive(self.result(0, 2, 3)) == []
        assert bench.sent[-1] == m.Replay(ID, 2, 3)
        end = m.End(ID, 3, "stop")
        assert bench.receive(self.result(2, 3, 3)) == [
            e.DeliverTokens(ID, [0] * 3, [b"0", b"1", b"2"]),
            e.ReportEnd(ID, end),
        ]

    def test_pages_that_overtake_the_end_are_handed_over_with_it(self, bench: Bench) -> None:
        self.run(bench)
        assert bench.receive(self.result(0, 3, 3)) == []
        end = m.End(ID, 3, "stop")
        assert bench.receive(end) == [e.DeliverTokens(ID, [0] * 3, [b"0", b"1", b"2"]), e.ReportEnd(ID, end)]

    def test_on_another_session_it_is_fetched_from_the_beginning(self, bench: Bench) -> None:
        self.run(bench)
        bench.receive(m.End(ID, 3, "stop"))
        bench.receive(self.result(0, 2, 3))
        bench.receive(m.Goodbye())
        bench.wait(200)
        bench.welcome(1)
        bench.heartbeat()
        (again,) = [message for message in bench.sent if isinstance(message, m.InferenceRequest)]
        assert (again.have, again.prompt_bytes, again.task) == (0, 0, "embed")
