"""The worker core: events in, actions out. The invariants are checked after every event."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest
from msgspec import Raw, structs

from llambo.mesh.link.link_core import CloseLink, OpenControl, OpenTokens, Publish, Send
from llambo.mesh.wire import limits, tokens, transfer
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.codec import NO_SESSION
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.worker.agent import events as e
from llambo.worker.agent.announcement import ProcessIdentity
from llambo.worker.agent.core import WorkerCore, check_invariants
from llambo.worker.config import WorkerConfig
from llambo.worker.engine import protocol as proto
from llambo.worker.engine.fake_model import logprob_of
from llambo.worker.engine.protocol import Output

SESSION, LATER = b"session1", b"session2"
MODELS = [m.ModelInfo("fake", "f")]
T = TypeVar("T")


class Rig:
    """A core, a clock, and all actions since the last `take`."""

    def __init__(self, **config: Any) -> None:
        self.core = WorkerCore(
            WorkerConfig(name="w", drain_ms=5_000, stall_ms=1_000, **config), ProcessIdentity(b"incarnat")
        )
        self.now = 1_000_000
        self.actions: list[e.Action] = []
        self.session = SESSION

    def on(self, event: e.Event) -> Rig:
        self.actions += self.core.handle(event, self.now)
        if not self.core.exited:
            check_invariants(self.core)
        return self

    def receive(self, message: m.Message, blob: bytes = b"", session: bytes | None = None) -> Rig:
        return self.on(e.ControlArrived(0, self.session if session is None else session, [(message, blob)]))

    def wait(self, ms: int) -> Rig:
        """Let time pass with a Tick whenever the core asks for one."""
        until = self.now + ms
        while (wake := self.core.next_wakeup_ms()) <= until:
            self.now = max(self.now, wake)
            self.on(e.Ticked())
            assert self.core.next_wakeup_ms() > self.now, "the core asks for one Tick after another"
        self.now = until
        return self

    def alive(self, ms: int) -> Rig:
        """Let time pass with a broker that sends heartbeats."""
        for _ in range(ms // 100):
            self.wait(100).receive(m.BrokerHeartbeat(1, self.core.links[0].beats.number))
        return self

    def take(self, kind: type[T]) -> list[T]:
        """The actions of one kind so far; all others are dropped."""
        found: list[T] = [action for action in self.actions if isinstance(action, kind)]
        self.actions = []
        return found

    def clear(self) -> Rig:
        self.actions = []
        return self

    def sent(self, kind: type[T]) -> list[T]:
        return [send.message for send in self.take(Send) if isinstance(send.message, kind)]

    def step(self, key: bytes, ids: list[int], end: Any = None) -> Rig:
        return self.on(proto.Step([Output(key, ids, [b" %d" % i for i in ids], end)]))


def loaded(slots: int = 4, **config: Any) -> Rig:
    """The engine is ready and the first hello is out."""
    rig = Rig(**config).on(e.Ticked())
    return rig.on(proto.Ready(MODELS, slots)).wait(200)


def joined(slots: int = 4, **config: Any) -> Rig:
    rig = loaded(slots, **config).receive(m.Welcome(SESSION, 7332), session=NO_SESSION)
    rig.on(e.Subscribed(0)).receive(m.BrokerHeartbeat(1, echo=2))
    assert rig.core.links[0].up
    rig.actions = []
    return rig


def key_of(number: int) -> bytes:
    return bytes([number]) * 16 + b"dispatch"


def dispatch(number: int, **changes: Any) -> m.Dispatch:
    fields = {"seq": number, "model": "fake", "max_tokens": 100, "seed": 7, **changes}
    return m.Dispatch(bytes([number]) * 16, b"dispatch", **fields)


def running(*numbers: int, **config: Any) -> Rig:
    rig = joined(**config)
    for number in numbers:
        rig.receive(dispatch(number), b"prompt")
    rig.actions = []
    return rig


def chunks(rig: Rig) -> list[dict[str, Any]]:
    return [tokens.describe(frame) for publish in rig.take(Publish) for frame in publish.frames if frame[:1] == b"T"]


# --- joining -----------------------------------------------------------------------------------------


def test_hello_is_sent_while_the_engine_loads() -> None:
    # Given a worker that starts
    rig = Rig(model="models/tiny.gguf").on(e.Ticked())
    # Then its engine is started and the broker is greeted, with what is known by now
    assert [type(action).__name__ for action in rig.actions] == ["Log", "SpawnEngine", "OpenControl", "Send"]
    (hello,) = rig.sent(m.WorkerHello)
    assert (hello.name, hello.state, hello.models, hello.incarnation) == (
        "w", "starting", [m.ModelInfo("tiny")], b"incarnat"
    )  # fmt: skip
    # When it was welcomed and the engine loads, Then its heartbeats say how far it is
    rig.receive(m.Welcome(SESSION, 7332), session=NO_SESSION).on(e.Subscribed(0)).receive(m.BrokerHeartbeat(1, echo=2))
    rig.on(proto.Progress("loading tiny: 43 %", percent=43)).alive(300)
    beat = rig.sent(m.WorkerHeartbeat)[-1]
    assert (beat.state, beat.percent, beat.note) == ("starting", 43, "loading tiny: 43 %")
    # And it accepts nothing
    assert rig.receive(dispatch(1), b"p").sent(m.Reject)[0].error.code is Code.BUSY


def test_what_was_loaded_is_in_every_heartbeat_after_a_hello_that_came_too_early() -> None:
    rig = Rig().on(e.Ticked()).receive(m.Welcome(SESSION, 7332), session=NO_SESSION)
    rig.on(e.Subscribed(0)).receive(m.BrokerHeartbeat(1, echo=2))
    assert rig.take(e.NotifyReady) == []
    rig.on(proto.Ready(MODELS, 3))
    assert e.NotifyReady() in rig.actions
    beats = rig.alive(1_000).sent(m.WorkerHeartbeat)
    assert len(beats) >= 4
    assert {(beat.state, beat.percent, beat.slots) for beat in beats} == {("ready", 0, 3)}
    assert all(beat.models == MODELS for beat in beats)
    # A later hello contains it
    rig.receive(m.Problem(ErrorInfo(Code.UNKNOWN_SESSION, "who?"))).wait(200)
    (hello,) = rig.sent(m.WorkerHello)
    assert (hello.models, hello.slots, hello.state) == (MODELS, 3, "ready")
    rig.receive(m.Welcome(LATER, 7332), session=NO_SESSION)
    rig.session = LATER
    assert {len(beat.models) for beat in rig.alive(500).sent(m.WorkerHeartbeat)} == {0}


def test_a_repeated_hello_is_the_same() -> None:
    rig = Rig().on(e.Ticked()).on(proto.Ready(MODELS, 3)).wait(600)
    first, second = rig.sent(m.WorkerHello)
    assert first == second
    # And the heartbeats report what the hello could not
    beat = rig.receive(m.Welcome(SESSION, 7332), session=NO_SESSION).sent(m.WorkerHeartbeat)[0]
    assert (beat.models, beat.slots) == (MODELS, 3)


def test_an_engine_that_restarts_is_reported_as_loading() -> None:
    rig = joined().on(e.EngineDied("it died")).alive(300).on(proto.Progress("x: 7 %", percent=7)).alive(200)
    beat = rig.sent(m.WorkerHeartbeat)[-1]
    assert (beat.state, beat.percent) == ("starting", 7)
    assert rig.on(proto.Ready(MODELS, 4)).sent(m.WorkerHeartbeat)[-1].state == "ready"


def test_a_welcome_opens_the_token_plane_and_beats_on_both_planes() -> None:
    rig = loaded().clear()
    rig.receive(m.Welcome(SESSION, 7332), session=NO_SESSION)
    kinds = [type(action) for action in rig.actions]
    assert kinds[:3] == [OpenTokens, Publish, Send]
    (beat,) = rig.sent(m.WorkerHeartbeat)
    assert (beat.beat, beat.state, beat.claims) == (1, "ready", {})


def test_a_subscription_is_answered_by_a_beat_at_once() -> None:
    rig = loaded().receive(m.Welcome(SESSION, 7332), session=NO_SESSION).clear()
    rig.on(e.Subscribed(0))
    (publish,) = [action for action in rig.actions if isinstance(action, Publish)]
    assert tokens.decode_beat(publish.frames[0]) == (2, SESSION)
    assert [beat.beat for beat in rig.sent(m.WorkerHeartbeat)] == [2]


def test_ready_is_notified_once_and_only_when_the_first_beat_was_echoed() -> None:
    rig = loaded().receive(m.Welcome(SESSION, 7332), session=NO_SESSION)
    assert rig.take(e.NotifyReady) == []
    rig.receive(m.BrokerHeartbeat(1, echo=1))
    assert rig.take(e.NotifyReady) == [e.NotifyReady()]
    rig.receive(m.Problem(ErrorInfo(Code.UNKNOWN_SESSION, "who?"))).wait(200)
    rig.receive(m.Welcome(LATER, 7332), session=NO_SESSION)
    rig.session = LATER
    rig.receive(m.BrokerHeartbeat(1, echo=1))
    assert rig.core.links[0].up
    assert rig.take(e.NotifyReady) == []


def test_messages_of_an_earlier_session_are_ignored() -> None:
    rig = joined().receive(dispatch(1), b"p", session=LATER).receive(m.Drain(), session=NO_SESSION)
    assert rig.take(object) == []


def test_a_silent_broker_is_left_and_sought_again() -> None:
    rig = joined().wait(2_100)
    assert CloseLink(0) in rig.actions
    assert rig.take(OpenControl) == [OpenControl(0)]


def test_a_token_plane_without_echo_is_rebuilt() -> None:
    rig = joined()
    for number in range(2, 9):
        rig.wait(200).receive(m.BrokerHeartbeat(number, echo=2))
    assert rig.take(OpenTokens) == [OpenTokens(0, 7332, b"")]


# --- dispatch ----------------------------------------------------------------------------------------


def test_a_dispatch_is_started_accepted_and_claimed() -> None:
    rig = joined()
    rig.receive(dispatch(1, prefix=[5, 6], deadline_ms=900, sampling=Raw(b"\x81\xa4stop\x91\xa1x")), b"prompt")
    (order,) = [action for action in rig.actions if isinstance(action, e.StartRun)]
    assert order.start.given == ["stop"], "what the request itself has is distinguished from a default"
    assert (order.start.key, order.start.prompt, order.start.prefix) == (key_of(1), b"prompt", [5, 6])
    assert (order.start.max_tokens, order.start.deadline_ms, order.start.sampling.stop) == (100, 900, ["x"])
    assert rig.sent(m.Accept) == [m.Accept(b"\1" * 16, b"dispatch")]
    rig.wait(200)
    beat = rig.sent(m.WorkerHeartbeat)[-1]
    assert (beat.claims, beat.seq) == ({key_of(1): 2}, 1)


def test_the_same_dispatch_twice_is_one_run() -> None:
    rig = running(1).receive(dispatch(1), b"prompt")
    assert rig.take(object) == []


@pytest.mark.parametrize(
    ("changes", "code", "final"),
    [
        ({"sampling": Raw(b"\x81\xabtemperature\xa3hot")}, Code.BAD_REQUEST, True),
        ({"sampling": Raw(b"\x93")}, Code.BAD_REQUEST, True),
        ({"model": "other"}, Code.UNKNOWN_MODEL, False),
    ],
)
def test_what_cannot_be_done_is_rejected(changes: dict[str, Any], code: Code, final: bool) -> None:
    rig = joined().receive(dispatch(1, **changes), b"p")
    (reject,) = rig.sent(m.Reject)
    assert (reject.error.code, reject.final) == (code, final)
    assert len(rig.core.runs) == 0


def test_more_than_the_slots_is_rejected_for_now_and_its_number_counts_as_seen() -> None:
    rig = joined(slots=1).receive(dispatch(1), b"p").receive(dispatch(2), b"p")
    (reject,) = rig.sent(m.Reject)
    assert (reject.id, reject.error.code, reject.final) == (b"\2" * 16, Code.BUSY, False)
    rig.wait(200)
    assert rig.sent(m.WorkerHeartbeat)[-1].seq == 2


def test_a_refusal_by_the_engine_rejects_and_frees_the_slot() -> None:
    rig = running(1, slots=1)
    error = ErrorInfo(Code.TOO_LONG, "300 of 200")
    rig.on(proto.Refused(key_of(1), error, final=True))
    assert rig.sent(m.Reject) == [m.Reject(b"\1" * 16, b"dispatch", error, True)]
    assert len(rig.receive(dispatch(2), b"p").take(e.StartRun)) == 1


# --- tokens ------------------------------------------------------------------------------------------


def test_a_step_is_one_order_with_one_frame_for_each_run() -> None:
    rig = running(1, 2)
    rig.on(proto.Step([Output(key_of(1), [10, 11], [b"a", b"b"]), Output(key_of(2), [20], [b"c"])]))
    rig.on(proto.Step([Output(key_of(1), [12], [b"d"], "length")]))
    publishes = [action for action in rig.actions if isinstance(action, Publish)]
    assert [len(publish.frames) for publish in publishes] == [2, 1]
    assert chunks(rig) == [
        {"first": 0, "ids": [10, 11], "flags": 0},
        {"first": 0, "ids": [20], "flags": 0},
        {"first": 2, "ids": [12], "flags": tokens.FINAL},
    ]


def test_the_end_names_the_stop_string() -> None:
    rig = running(1, 2)
    rig.on(proto.Step([Output(key_of(1), [10], [b"a"], "stop", stop="##"), Output(key_of(2), [20], [b"c"], "stop")]))
    assert [(end.reason, end.stop) for end in rig.sent(m.End)] == [("stop", "##"), ("stop", "")]


def test_indices_go_on_after_the_prefix() -> None:
    rig = joined().receive(dispatch(1, prefix=[1, 2, 3]), b"p").step(key_of(1), [4], "stop")
    assert [chunk["first"] for chunk in chunks(rig)] == [3]
    assert rig.wait(500).sent(m.End)[0].count == 4


def test_a_chunk_longer_than_a_frame_is_cut() -> None:
    rig = running(1)
    rig.on(proto.Step([Output(key_of(1), list(range(10)), [b"x" * 60_000] * 10)]))
    frames = [frame for publish in rig.take(Publish) for frame in publish.frames]
    assert all(len(frame) <= limits.TOKEN_FRAME_BYTES for frame in frames)
    assert tokens.ids_of(frames) == list(range(10))


def test_end_is_sent_until_it_is_acknowledged() -> None:
    # Given a run that has ended
    rig = running(1).step(key_of(1), [1, 2], "length")
    end = m.End(b"\1" * 16, 2, "length", b"dispatch")
    assert rig.sent(m.End) == [end]
    # When it is not acknowledged, Then it is sent every half second
    rig.alive(1_000)
    assert rig.sent(m.End) == [end, end]
    # When it is acknowledged, Then never again
    rig.receive(m.EndAck([key_of(1), key_of(9)])).alive(1_000)
    assert rig.sent(m.End) == []
    assert len(rig.core.runs) == 0


def test_an_ended_run_is_claimed_but_has_no_slot() -> None:
    rig = running(1, slots=1).step(key_of(1), [1], "length").wait(200)
    assert rig.sent(m.WorkerHeartbeat)[-1].claims == {key_of(1): 1}
    assert len(rig.receive(dispatch(2), b"p").take(e.StartRun)) == 1


def test_an_early_acknowledgement_does_not_end_a_run() -> None:
    rig = running(1).receive(m.EndAck([key_of(1)])).step(key_of(1), [1])
    assert len(chunks(rig)) == 1


# --- replay ------------------------------------------------------------------------------------------


def replayed(rig: Rig, first: int, until: int = 0) -> m.Page:
    (page,) = rig.receive(m.Replay(b"\1" * 16, first, until, b"dispatch")).sent(m.Page)
    assert sum(map(len, page.chunks)) <= limits.PAGE_BYTES
    assert len(page.chunks) <= limits.PAGE_CHUNKS
    assert all(len(chunk) <= limits.TOKEN_FRAME_BYTES for chunk in page.chunks)
    return page


@pytest.mark.parametrize(
    ("first", "until", "ids"),
    [(0, 0, [3, 4, 5, 6]), (3, 0, [4, 5, 6]), (3, 5, [4, 5]), (5, 99, [6]), (6, 0, []), (9, 0, []), (4, 2, [])],
)
def test_a_replay_is_one_coalesced_chunk(first: int, until: int, ids: list[int]) -> None:
    # Given a run that began after a prefix of two and published four tokens in four chunks
    rig = joined().receive(dispatch(1, prefix=[1, 2]), b"p")
    for token in (3, 4, 5, 6):
        rig.step(key_of(1), [token])
    rig.actions = []
    # When a part is asked for
    page = replayed(rig, first, until)
    # Then only the worker's own tokens are sent: the broker has the prefix
    assert [i for chunk in page.chunks for i in tokens.describe(chunk)["ids"]] == ids
    assert page.total == 6
    assert page.next - page.first == len(ids)
    assert len(page.chunks) <= 1


def test_a_long_run_is_replayed_in_pages() -> None:
    rig = running(1)
    count = 60_000
    for first in range(0, count, 1_000):
        rig.step(key_of(1), list(range(first, first + 1_000)))
    rig.step(key_of(1), [count], "length").clear()
    at, frames = 0, []
    while at <= count:
        page = replayed(rig, at)
        assert (page.first, page.total) == (at, count + 1)
        frames += page.chunks
        at = page.next
    assert tokens.ids_of(frames) == list(range(count + 1))
    pieces = [piece for frame in frames if (chunk := tokens.decode_chunk(frame)) for piece in chunk.body.pieces]
    assert pieces == [b" %d" % i for i in range(count + 1)]
    assert tokens.describe(frames[-1])["flags"] == tokens.FINAL
    assert len(frames) < 40


def test_logprobs_are_published_kept_and_replayed_as_they_were() -> None:
    logprobs = [logprob_of(token, token, 20) for token in range(3_000)]
    rig = running(1)
    for first in range(0, 3_000, 100):
        ids = list(range(first, first + 100))
        rig.on(proto.Step([Output(key_of(1), ids, [b"x"] * 100, logprobs=logprobs[first : first + 100])]))
    published = [frame for publish in rig.take(Publish) for frame in publish.frames if frame[:1] == tokens.CHUNK]
    assert logprobs_of(published) == logprobs
    at, replayed_frames = 7, []
    while at < 3_000:
        page = replayed(rig, at)
        assert sum(map(len, page.chunks)) <= limits.PAGE_BYTES
        assert page.next > at
        replayed_frames += page.chunks
        at = page.next
    assert logprobs_of(replayed_frames) == logprobs[7:]
    assert len(replayed_frames) < 20, "they are put together"


def logprobs_of(frames: list[bytes]) -> list[tokens.Logprob]:
    chunks = [tokens.decode_chunk(frame) for frame in frames]
    return [logprob for chunk in chunks if chunk is not None for logprob in chunk.body.logprobs or []]


def test_a_step_whose_logprobs_exceed_a_frame_is_cut() -> None:
    logprobs = [logprob_of(token, token, 20) for token in range(2_000)]
    rig = running(1)
    rig.on(proto.Step([Output(key_of(1), list(range(2_000)), [b"x"] * 2_000, logprobs=logprobs)]))
    frames = [frame for publish in rig.take(Publish) for frame in publish.frames if frame[:1] == tokens.CHUNK]
    assert max(map(len, frames)) <= limits.TOKEN_FRAME_BYTES
    assert logprobs_of(frames) == logprobs


def test_a_replay_of_an_unknown_run_is_ignored() -> None:
    assert joined().receive(m.Replay(b"\1" * 16, 0, 0, b"dispatch")).take(object) == []


# --- cancel ------------------------------------------------------------------------------------------


def test_cancel_stops_the_engine_and_answers_with_end() -> None:
    rig = running(1, slots=1).step(key_of(1), [1, 2]).clear()
    rig.receive(m.Cancel(b"\1" * 16, b"dispatch"))
    assert e.StopRun(key_of(1)) in rig.actions
    assert rig.sent(m.End) == [m.End(b"\1" * 16, 2, "cancelled", b"dispatch")]
    # Tokens that were in flight are dropped, and the slot is free.
    assert chunks(rig.step(key_of(1), [3])) == []
    assert len(rig.receive(dispatch(2), b"p").take(e.StartRun)) == 1


def test_cancel_after_the_end_says_the_same_end() -> None:
    rig = running(1).step(key_of(1), [1], "stop")
    (end,) = rig.sent(m.End)
    assert rig.receive(m.Cancel(b"\1" * 16, b"dispatch")).sent(m.End) == [end]


def test_cancel_of_an_unknown_run_is_answered_once() -> None:
    rig = joined().receive(m.Cancel(b"\1" * 16, b"dispatch"))
    assert rig.sent(m.End) == [m.End(b"\1" * 16, 0, "cancelled", b"dispatch")]
    assert rig.alive(2_000).sent(m.End) == []


# --- the engine dies ---------------------------------------------------------------------------------


def test_engine_death_loses_what_runs_and_keeps_what_ended() -> None:
    # Given one run that has ended and two that go on
    rig = running(1, 2, 3).step(key_of(1), [1], "stop").step(key_of(2), [1]).clear()
    # When the engine dies
    rig.on(e.EngineDied("SIGSEGV"))
    # Then the broker receives which are lost, and that there is no engine
    sent = [send.message for send in rig.take(Send)]
    assert sent[0] == m.EngineLost([key_of(2), key_of(3)], "SIGSEGV", [1, 0])
    (beat,) = [message for message in sent if isinstance(message, m.WorkerHeartbeat)]
    assert (beat.state, beat.claims) == ("starting", {key_of(1): 1})
    assert "SIGSEGV" in beat.note
    # And a dispatch in the meantime is rejected
    assert rig.receive(dispatch(4), b"p").sent(m.Reject)[0].error.code is Code.BUSY


def test_what_a_hung_engine_has_never_read_is_not_laid_to_its_charge() -> None:
    # Given an engine that says nothing any more
    rig = running(1).step(key_of(1), [1]).alive(500)
    # When it is given something else, and is killed for its silence
    rig.receive(dispatch(2), b"p")
    rig.clear().alive(500)
    # Then only what it was doing is named; the other is simply not claimed
    sent = [send.message for send in rig.take(Send)]
    at = sent.index(m.EngineLost([key_of(1)], rig.core.engine.note, [1]))
    beat = sent[at + 1]
    assert isinstance(beat, m.WorkerHeartbeat)
    assert beat.claims == {}


def test_no_two_suspects_run_together_whichever_broker_sends_them() -> None:
    # Given a running suspect that has to make its third token
    rig = joined().receive(structs.replace(dispatch(1), suspect=2), b"p")
    rig.step(key_of(1), [1, 2])
    # When another one comes, then it is refused, and a request that is none is not
    other = structs.replace(dispatch(2), suspect=0)
    assert rig.receive(other, b"p").sent(m.Reject)[0].error == ErrorInfo(Code.BUSY, "another suspect is running here")
    assert rig.receive(dispatch(3), b"p").sent(m.Accept)
    # ... until the first one is past that token
    rig.step(key_of(1), [3])
    assert rig.receive(other, b"p").sent(m.Accept)


def test_an_engine_killed_from_outside_is_reported_so() -> None:
    rig = running(1).clear()
    assert rig.on(e.EngineDied("SIGKILL", outside=True)).sent(m.EngineLost)[0].outside


def test_the_engine_is_started_again_with_back_off_that_forgets() -> None:
    rig = joined()
    pauses = []
    for _ in range(8):
        rig.on(e.EngineDied("it died"))
        before, rig.actions = rig.now, []
        while not rig.take(e.SpawnEngine):
            rig.alive(100)
        pauses.append(rig.now - before)
        rig.on(proto.Ready(MODELS, 4))
    assert pauses == [300, 500, 1_000, 2_000, 4_000, 8_000, 10_000, 10_000]
    rig.alive(30_000).on(e.EngineDied("it died")).clear()
    assert rig.wait(250).take(e.SpawnEngine) == [e.SpawnEngine()]
    rig.on(proto.Ready(MODELS, 4))
    assert rig.sent(m.WorkerHeartbeat)[-1].engine_restarts == 9


def test_a_stalled_engine_is_killed_and_its_runs_are_reported_at_once() -> None:
    rig = running(1).step(key_of(1), [1]).clear()
    rig.alive(1_000)
    assert e.KillEngine() in rig.actions
    assert rig.sent(m.EngineLost)[0].runs == [key_of(1)]
    # Another engine is started only after its death.
    rig.alive(5_000)
    assert rig.take(e.SpawnEngine) == []
    rig.on(e.EngineDied("SIGKILL")).alive(300)
    assert rig.take(e.SpawnEngine) == [e.SpawnEngine()]


def test_an_agent_that_stood_still_does_not_take_its_engine_for_hung() -> None:
    rig = running(1).step(key_of(1), [1])
    rig.core.next_wakeup_ms()
    # When it is stopped for longer than an engine may be silent, and reads what came meanwhile
    rig.now += 3_000
    rig.on(e.Ticked()).on(e.Ticked()).on(e.Ticked())
    assert e.KillEngine() not in rig.actions
    # Then an engine that really hangs is found in its time
    rig.clear().wait(799)
    assert e.KillEngine() not in rig.actions
    rig.wait(1)
    assert e.KillEngine() in rig.actions


def test_an_idle_engine_may_be_silent_and_an_empty_step_is_a_sign_of_life() -> None:
    rig = joined().alive(5_000).receive(dispatch(1), b"p")
    for _ in range(10):
        rig.alive(900).on(proto.Step([]))
    assert rig.take(e.KillEngine) == []


def test_an_engine_that_never_loads_is_killed() -> None:
    rig = Rig(load_ms=3_000).on(e.Ticked()).wait(2_000).on(proto.Progress("10 %")).wait(2_900)
    assert rig.take(e.KillEngine) == []
    assert rig.wait(100).take(e.KillEngine) == [e.KillEngine()]


def test_an_engine_that_comes_back_different_is_reported_in_the_same_session() -> None:
    rig = joined().on(e.EngineDied("x")).alive(300).clear()
    beat = rig.on(proto.Ready([m.ModelInfo("fake", "other")], 2)).sent(m.WorkerHeartbeat)[-1]
    assert (beat.models, beat.slots) == ([m.ModelInfo("fake", "other")], 2)
    assert rig.core.links[0].up


def test_the_library_is_reported_with_the_models_once_it_is_loaded() -> None:
    rig = Rig().on(e.Ticked())
    assert rig.sent(m.WorkerHello)[-1].library == ""
    rig = joined().on(e.EngineDied("x")).alive(300).clear()
    ready = proto.Ready(MODELS, 4, library="llama.cpp 5 " * 20)
    beat = rig.on(ready).sent(m.WorkerHeartbeat)[-1]
    assert (beat.models, beat.library) == (MODELS, ready.library[:128])
    # The next session begins with it, and its beats need not repeat it.
    rig = back(rig.receive(m.Problem(ErrorInfo(Code.UNKNOWN_SESSION, "who?"))))
    assert rig.sent(m.WorkerHello)[-1].library == ready.library[:128]
    assert rig.clear().alive(1_000).sent(m.WorkerHeartbeat)[-1].library == ""


# --- sessions ----------------------------------------------------------------------------------------


def lost(*numbers: int, **config: Any) -> Rig:
    """Its broker is gone while these run."""
    return running(*numbers, **config).receive(m.Problem(ErrorInfo(Code.UNKNOWN_SESSION, "who?"))).clear()


def back(rig: Rig) -> Rig:
    """A broker says welcome again."""
    rig.wait(200).receive(m.Welcome(LATER, 7332), session=NO_SESSION)
    rig.session = LATER
    return rig


def orphans(rig: Rig) -> list[tuple[m.Orphan, bytes]]:
    sends = [send for send in rig.take(Send) if isinstance(send.message, m.Orphan)]
    return [(send.message, send.blob or b"") for send in sends if isinstance(send.message, m.Orphan)]


def test_runs_survive_their_broker_and_are_announced_to_the_next() -> None:
    # Given a run with a deadline that continues two tokens, and has lost its broker after a third
    existing, prompt_bytes = transfer.pack(b"prompt", [tokens.encode_chunk(key_of(1), 0, [1, 2], [b"a", b"b"])])
    rig = joined().receive(dispatch(1, prefix=[1, 2], prompt_bytes=prompt_bytes, deadline_ms=9_000), existing)
    rig.step(key_of(1), [3]).receive(m.Goodbye("restart")).step(key_of(1), [4])
    # When a broker says welcome
    rig.actions = []
    ((orphan, blob),) = orphans(back(rig))
    # Then all of it is sent to that broker, and the time that is left
    assert orphan.home and orphan.work.id == dispatch(1).id and orphan.work.dispatch == dispatch(1).dispatch
    assert 8_000 < orphan.work.deadline_ms < 9_000
    prompt, continued = transfer.unpack(blob, orphan.work.prompt_bytes)
    assert (prompt, tokens.ids_of(continued)) == (b"prompt", [1, 2, 3, 4])
    # and nothing of it is claimed or published until it is adopted
    rig.alive(300).step(key_of(1), [5])
    assert rig.sent(m.WorkerHeartbeat)[-1].claims == {} and chunks(rig) == []
    rig.receive(m.Adopt(dispatch(1).id, dispatch(1).dispatch, 12)).wait(1)
    beat = rig.sent(m.WorkerHeartbeat)[-1]
    assert (beat.claims, beat.seq, beat.busy) == ({key_of(1): 5}, 12, 0)
    assert chunks(rig.step(key_of(1), [6])) == [{"first": 5, "ids": [6], "flags": 0}]


def test_a_run_that_ended_without_a_broker_says_its_end_to_the_one_that_adopts_it() -> None:
    rig = back(lost(1).step(key_of(1), [1], "stop")).clear()
    rig.alive(1_000)
    assert rig.sent(m.End) == []
    rig.receive(m.Adopt(dispatch(1).id, dispatch(1).dispatch, 3))
    assert [end.count for end in rig.sent(m.End)] == [1]
    assert [end.count for end in rig.alive(600).sent(m.End)] == [1]  # and again, until it is acknowledged


def test_orphans_take_slots_and_say_so() -> None:
    rig = back(lost(1, 2, slots=2)).clear()
    assert rig.alive(300).sent(m.WorkerHeartbeat)[-1].busy == 2
    assert rig.receive(dispatch(3), b"p").sent(m.Reject)[0].error.code is Code.BUSY


def test_a_run_that_no_broker_adopts_is_stopped() -> None:
    rig = back(lost(1, orphan_ms=700).step(key_of(1), [1]))
    rig.alive(400)
    assert len(rig.core.runs) == 1
    rig.alive(200)
    assert rig.take(e.StopRun) == [e.StopRun(key_of(1))] and len(rig.core.runs) == 0
    # and an Adopt that comes too late is answered by a beat that does not claim it
    rig.receive(m.Adopt(dispatch(1).id, dispatch(1).dispatch, 9)).wait(1)
    beat = rig.sent(m.WorkerHeartbeat)[-1]
    assert (beat.seq, beat.claims) == (9, {})


def test_a_broker_that_knows_better_cancels_an_orphan() -> None:
    rig = back(lost(1)).clear()
    rig.receive(m.Cancel(dispatch(1).id, dispatch(1).dispatch))
    assert [end.reason for end in rig.sent(m.End)] == ["cancelled"]


def test_a_run_without_the_text_of_its_prefix_cannot_be_given_back() -> None:
    rig = joined().receive(dispatch(1, prefix=[1, 2]), b"p").receive(m.Goodbye("restart"))
    assert orphans(back(rig)) == []


def test_nothing_is_published_or_sent_without_a_session() -> None:
    rig = running(1).receive(m.Goodbye("restart")).clear()
    rig.step(key_of(1), [1], "stop")
    assert [action for action in rig.actions if isinstance(action, Publish | Send)] == []


def test_a_refused_hello_is_logged_and_tried_again() -> None:
    rig = loaded().clear()
    rig.receive(m.Problem(ErrorInfo(Code.NAME_TAKEN, "'w' is taken")), session=NO_SESSION)
    assert any("'w' is taken" in log.text for log in rig.take(e.Log))
    assert len(rig.wait(300).sent(m.WorkerHello)) == 1


def test_a_refusal_is_repeated_when_the_engine_is_ready_and_every_minute() -> None:
    rig = Rig().on(e.Ticked()).wait(200).clear()
    taken = m.Problem(ErrorInfo(Code.NAME_TAKEN, "the name 'w' is taken"))
    assert [log.text for log in rig.receive(taken, session=NO_SESSION).take(e.Log)] == [
        "tcp://127.0.0.1:7330: the name 'w' is taken; trying again"
    ]
    rig.on(proto.Ready(MODELS, 4))
    warnings = [log.text for log in rig.take(e.Log) if log.warning]
    refused = "tcp://127.0.0.1:7330: the name 'w' is taken; trying again"
    assert warnings == [f"the engine is ready, but this worker gets no requests: {refused}"]
    logged: list[str] = []
    for _ in range(1_500):
        if any(isinstance(action, Send) for action in rig.wait(100).actions):
            rig.receive(taken, session=NO_SESSION)
        logged += [log.text for log in rig.take(e.Log) if log.warning]
    assert logged == [refused] * 2, "in two and a half minutes"


def test_the_end_of_a_warning_about_a_link_is_logged_as_well() -> None:
    def warnings() -> list[str]:
        return [log.text for log in rig.take(e.Log) if log.warning]

    # Given a worker that was connected from the start
    rig = joined()
    assert warnings() == []
    # When its broker leaves, and is there again
    rig.clear().receive(m.Goodbye("restart"))
    (lost,) = warnings()
    assert lost.startswith("tcp://127.0.0.1:7330: ") and lost.endswith("; trying again")
    back(rig).on(e.Subscribed(0)).receive(m.BrokerHeartbeat(1, echo=2))
    assert warnings() == ["connected again to tcp://127.0.0.1:7330"]


def test_two_brokers_have_two_links_and_their_own_claims() -> None:
    rig = loaded(brokers=("tcp://a:1", "tcp://b:1"))
    for link, session in ((0, SESSION), (1, LATER)):
        rig.on(e.ControlArrived(link, NO_SESSION, [(m.Welcome(session, 7332), b"")]))
        rig.on(e.ControlArrived(link, session, [(dispatch(link + 1), b"p")]))
    rig.wait(200)
    beats = {send.link: send.message.claims for send in rig.take(Send) if isinstance(send.message, m.WorkerHeartbeat)}
    assert beats == {0: {key_of(1): 0}, 1: {key_of(2): 0}}


# --- leaving -----------------------------------------------------------------------------------------


def test_stop_drains_and_then_leaves() -> None:
    # Given a run
    rig = running(1)
    # When the worker is ordered to stop
    rig.on(e.StopRequested())
    # Then it reports that and accepts nothing new
    assert rig.sent(m.WorkerHeartbeat)[-1].state == "draining"
    assert rig.receive(dispatch(2), b"p").sent(m.Reject)[0].error.code is Code.BUSY
    # And leaves when the run was delivered
    rig.step(key_of(1), [1], "length")
    assert rig.take(e.Exit) == []
    rig.receive(m.EndAck([key_of(1)]))
    assert [type(action).__name__ for action in rig.actions] == ["Send", "CloseLink", "KillEngine", "Exit"]
    assert rig.sent(m.Goodbye) == [m.Goodbye("stopped")]
    assert rig.core.next_wakeup_ms() > 10**15


def test_draining_ends_when_its_time_is_over() -> None:
    rig = running(1).on(e.StopRequested())
    for _ in range(49):
        rig.alive(100).on(proto.Step([]))
    assert rig.take(e.Exit) == []
    assert len(rig.alive(200).take(e.Exit)) == 1


def test_a_second_request_stops_at_once() -> None:
    rig = running(1).on(e.StopRequested()).on(e.StopRequested())
    assert len(rig.take(e.Exit)) == 1


def test_stop_without_a_broker_does_not_wait() -> None:
    assert len(Rig().on(e.Ticked()).on(e.StopRequested()).take(e.Exit)) == 1


def test_a_broker_may_drain_a_worker_and_change_its_mind() -> None:
    rig = joined().receive(m.Drain())
    assert rig.sent(m.WorkerHeartbeat)[-1].state == "draining"
    assert len(rig.receive(dispatch(1), b"p").sent(m.Reject)) == 1
    rig.receive(m.Drain(undo=True))
    assert rig.sent(m.WorkerHeartbeat)[-1].state == "ready"
    assert len(rig.receive(dispatch(2), b"p").sent(m.Accept)) == 1


def test_the_rate_is_that_of_the_last_second() -> None:
    rig = running(1)
    for _ in range(20):
        rig.step(key_of(1), [1] * 10).alive(100)
    assert rig.sent(m.WorkerHeartbeat)[-1].rate == pytest.approx(100, rel=0.2)


def test_a_worker_that_is_to_stop_unless_busy_goes_on_if_it_is() -> None:
    rig = running(1).on(e.StopRequested(unless_busy=True))
    assert rig.core.drain.refusals == 1 and rig.core.state == "ready"
    rig = joined().on(e.StopRequested(unless_busy=True))
    assert rig.core.drain.refusals == 0 and len(rig.take(e.Exit)) == 1


@pytest.mark.parametrize("how", ["said", "killed", "neither", "another reason"])
def test_a_load_that_fails_for_want_of_memory_is_recognised(how: str) -> None:
    rig = Rig().on(e.Ticked())
    if how == "killed":
        rig.on(e.EngineDied("SIGKILL", outside=True)).on(e.EngineDied("SIGKILL", outside=True))
    else:
        rig.on(proto.Progress("", "it cannot be loaded", out_of_memory=how == "said"))
        rig.on(e.EngineDied("it ended", outside=how == "another reason"))
    assert len(rig.take(e.Exit)) == 1 and rig.core.engine.out_of_memory is (how in ("said", "killed"))


def test_an_engine_that_dies_while_it_loads_is_started_again_at_once_with_safe_settings() -> None:
    rig = Rig().on(e.Ticked())
    assert rig.take(e.SpawnEngine) == [e.SpawnEngine()]
    rig.clear().on(proto.Progress("testing")).on(e.EngineDied("the engine was ended by SIGSEGV"))
    logged = [action.text for action in rig.actions if isinstance(action, e.Log)]
    assert rig.take(e.SpawnEngine) == [e.SpawnEngine(safe=True)]
    assert "SIGSEGV while loading; trying again with safe settings" in logged[0]
    # From then on it has safe settings, and a restart waits as before.
    rig.on(proto.Ready(MODELS, 4)).on(e.EngineDied("it died")).clear()
    assert rig.wait(250).take(e.SpawnEngine) == [e.SpawnEngine(safe=True)]


@pytest.mark.parametrize("kind", ["gave a reason", "died twice", "silent"])
def test_a_first_load_that_fails_for_good_ends_the_worker_with_the_reason(kind: str) -> None:
    rig = Rig(load_ms=3_000, model="x.gguf").on(e.Ticked()).receive(m.Welcome(SESSION, 7332), session=NO_SESSION)
    if kind == "gave a reason":
        rig.on(proto.Progress("", "x.gguf is cut off")).on(e.EngineDied("the engine exited with status 3"))
    elif kind == "died twice":
        rig.on(e.EngineDied("the engine was ended by SIGSEGV"))
        assert rig.take(e.SpawnEngine)[-1] == e.SpawnEngine(safe=True)
        rig.on(e.EngineDied("the engine was ended by SIGSEGV"))
    else:
        rig.alive(3_100).on(e.EngineDied("the engine was ended by SIGKILL"))
    reason = {
        "gave a reason": "x.gguf is cut off",
        "died twice": "the engine was ended by SIGSEGV while loading, with safe settings too",
        "silent": "the engine stalled: silent for 3000 ms while loading",
    }[kind]
    note = f"cannot serve x.gguf: {reason}"
    assert rig.actions[-1] == e.Exit(note, status=1)
    assert rig.sent(m.Goodbye) == [m.Goodbye(note)]
    assert rig.core.exited


def test_an_engine_that_once_was_ready_and_cannot_load_any_more_is_tried_again() -> None:
    rig = joined().on(e.EngineDied("it died")).alive(300).clear()
    rig.on(proto.Progress("", "x.gguf is cut off")).on(e.EngineDied("the engine exited with status 3"))
    logged = [action.text for action in rig.actions if isinstance(action, e.Log)]
    assert "x.gguf is cut off; a new engine in 500 ms" in logged[0]
    assert rig.take(e.SpawnEngine) == []
    assert rig.alive(600).take(e.SpawnEngine) == [e.SpawnEngine()]
