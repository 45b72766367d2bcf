"""The asyncio client and the sync one over real sockets, against the double of `double_for_clients.py`."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from llambo import Client, LlamboError, Stream, SyncClient
from llambo.mesh.client.answer_stream import BUFFER_BYTES, limit_buffer
from llambo.mesh.link.link import DRAIN_MESSAGES
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.reports import DrainReply, MeshStatus
from tests.integration.double_for_clients import LONG_FRAME, DoubleBroker, Run, bind_both

DEADLINE_S = 60
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def broker() -> Iterator[DoubleBroker]:
    with DoubleBroker() as double:
        yield double
        print("the double received:", *double.story, sep="\n  ")


def wait_for(event: Any, what: str) -> None:
    assert event.wait(DEADLINE_S), f"{what} did not happen within {DEADLINE_S} s"


async def until(event: Any, what: str) -> None:
    await asyncio.get_running_loop().run_in_executor(None, wait_for, event, what)


class TestAnswers:
    async def test_generate_gives_the_whole_answer(self, broker: DoubleBroker) -> None:
        async with Client(broker.address) as client:
            answer = await client.generate("words: the cat sat", max_tokens=7, temperature=0.5, stop="dog")
        assert (answer.text, answer.ids, answer.reason) == ("the cat sat ", [0, 1, 2], "stop")
        assert (answer.worker, answer.moves) == ("double", 0)
        request = broker.runs[bytes.fromhex(answer.id)].request
        assert (request.max_tokens, request.stream) == (7, False)
        assert isinstance(request.seed, int)

    async def test_stream_gives_pieces_in_order(self, broker: DoubleBroker) -> None:
        async with Client(broker.address) as client:
            stream = client.stream("words: the cat sat")
            pieces = [piece async for piece in stream]
        assert "".join(piece.text for piece in pieces) == "the cat sat "
        assert [id for piece in pieces for id in piece.ids] == [0, 1, 2]
        assert [piece.index for piece in pieces] == [piece.ids[0] for piece in pieces]
        assert stream.answer is not None
        assert (stream.answer.text, stream.answer.id) == ("the cat sat ", stream.id)
        assert (stream.ahead, stream.model) == (0, "tiny")

    async def test_a_character_is_never_shown_half(self, broker: DoubleBroker) -> None:
        async with Client(broker.address) as client:
            stream = client.stream("split: héllo wörld €")
            pieces = [piece.text async for piece in stream]
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) == "héllo wörld €"

    async def test_many_at_once(self, broker: DoubleBroker) -> None:
        async with Client(broker.address) as client:
            prompts = [f"words: request number {number}" for number in range(200)]
            answers = await asyncio.gather(*(client.generate(prompt, stream=True) for prompt in prompts))
        assert [answer.text for answer in answers] == [prompt[7:] + " " for prompt in prompts]

    async def test_the_end_is_acknowledged(self, broker: DoubleBroker) -> None:
        async with Client(broker.address) as client:
            await client.generate("words: a")
            await until(broker.acknowledged, "the acknowledgement")


class TestLoss:
    async def test_lost_frames_are_fetched(self, broker: DoubleBroker) -> None:
        # Given a token plane that loses every third frame, and the last ones
        broker.lose = lambda number: number % 3 == 0 or number > 90
        async with Client(broker.address) as client:
            answer = await client.generate("split: " + "x" * 100, stream=True)
            assert answer.text == "x" * 100
            assert answer.ids == list(range(100))
            assert 0 < client.counters.replays <= 40

    async def test_without_any_token_plane_the_stream_goes_on(self, broker: DoubleBroker) -> None:
        broker.lose = lambda number: True
        async with Client(broker.address) as client:
            answer = await client.generate("count: 5000", stream=True)
            assert answer.ids == list(range(5_000))

    async def test_a_broker_that_forgot_the_session_gets_the_request_again(self, broker: DoubleBroker) -> None:
        # Given a stream that has begun
        async with Client(broker.address) as client:
            stream = client.stream("endless:")
            first = await stream.next_piece()
            assert first is not None
            assert first.ids == [0]
            # When the broker forgets all sessions, and the answer goes on meanwhile
            found = broker.runs[bytes.fromhex(stream.id)]
            broker.forget_sessions.set()
            found.pieces += [b"on ", b"and "]
            found.reason = "stop"
            # Then the rest arrives, and nothing twice
            answer = await stream.result()
        assert answer.text == "and on and "
        requests = [message for message in broker.received if isinstance(message, m.InferenceRequest)]
        assert [request.have for request in requests] in ([0, 1], [0])

    async def test_a_reader_that_stalls_costs_no_memory_and_loses_nothing(self, broker: DoubleBroker) -> None:
        # Given a small buffer and a long answer
        async with Client(broker.address) as client:
            stream = client.stream("count: 200000")
            limit_buffer(stream, 2_000, BUFFER_BYTES)
            ids: list[int] = []
            most = 0
            # When the reader lets everything else have a turn again and again before it reads on
            while (piece := await stream.next_piece()) is not None:
                ids += piece.ids
                most = max(most, len(piece.ids))
                await client.status()
        # Then it had everything, and never much at a time
        assert ids == list(range(200_000))
        assert most < 2_000 + DRAIN_MESSAGES * LONG_FRAME


class TestCancelling:
    async def test_leaving_the_loop_early_cancels(self, broker: DoubleBroker) -> None:
        async with Client(broker.address) as client:
            async for piece in client.stream("endless:"):
                assert piece.text == "and "
                break
            await until(broker.cancelled, "the cancel")

    async def test_cancelling_ends_the_stream_with_what_there_is(self, broker: DoubleBroker) -> None:
        async with Client(broker.address) as client, client.stream("endless:") as stream:
            await stream.next_piece()
            await stream.cancel()
            answer = await stream.result()
        assert (answer.reason, answer.text) == ("cancelled", "and ")

    async def test_cancelling_by_the_beginning_of_the_id(self, broker: DoubleBroker) -> None:
        async with Client(broker.address) as client, Client(broker.address) as other:
            stream = client.stream("endless:")
            await stream.next_piece()
            assert await other.cancel(stream.id[:8]) == "cancelled"
            assert (await stream.result()).reason == "cancelled"

    async def test_cancelling_what_does_not_exist(self, broker: DoubleBroker) -> None:
        async with Client(broker.address) as client:
            with pytest.raises(LlamboError) as caught:
                await client.cancel("00" * 16)
            assert caught.value.code is Code.UNKNOWN_REQUEST

    async def test_a_cancelled_task_cancels_its_request(self, broker: DoubleBroker) -> None:
        async with Client(broker.address) as client:
            started = asyncio.Event()
            loop = asyncio.get_running_loop()

            def arrived(run: Run) -> None:
                loop.call_soon_threadsafe(started.set)

            broker.on_request = arrived
            task = asyncio.create_task(client.generate("endless:"))
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(broker.cancelled, "the cancel")

    async def test_closing_the_client_cancels_what_runs(self, broker: DoubleBroker) -> None:
        async with Client(broker.address) as client:
            stream = client.stream("endless:")
            await stream.next_piece()
        with pytest.raises(LlamboError):
            await stream.result()
        await until(broker.cancelled, "the cancel")


class TestDetached:
    async def test_submit_and_attach(self, broker: DoubleBroker) -> None:
        async with Client(broker.address) as client:
            id = await client.submit("words: the cat sat")
            assert broker.runs[bytes.fromhex(id)].request.detached
        async with Client(broker.address) as other:
            stream = await other.attach(id[:6])
            assert stream.id == id
            assert (await stream.result()).text == "the cat sat "

    async def test_closing_an_attached_stream_does_not_cancel_it(self, broker: DoubleBroker) -> None:
        async with Client(broker.address) as client:
            id = await client.submit("endless:")
            async with await client.attach(id) as stream:
                with pytest.raises(LlamboError, match="follows"):
                    await client.attach(id)
                await stream.next_piece()
            await client.status()
            assert not broker.cancelled.is_set()


class TestErrors:
    async def test_no_broker_answers(self) -> None:
        # Given a port that takes connections and says nothing
        context: zmq.Context[Any] = zmq.Context()
        control, out, port = bind_both(context)
        with pytest.raises(LlamboError) as caught:
            await Client(f"tcp://127.0.0.1:{port}", connect_ms=100).connect()
        assert caught.value.code is Code.NO_BROKER
        assert caught.value.text == (
            f"no broker answers at tcp://127.0.0.1:{port}; start one with `llambo-broker` or `llambo up`"
        )
        assert caught.value.__suppress_context__, "how it was noticed is no part of a traceback"
        control.close(linger=0)
        out.close(linger=0)
        context.term()

    def test_an_address_that_is_none(self) -> None:
        with pytest.raises(LlamboError) as caught:
            Client("http://example.org/")
        assert caught.value.code is Code.BAD_SETTING

    async def test_a_refusal_is_raised_with_its_advice(self, broker: DoubleBroker) -> None:
        async with Client(broker.address) as client:
            with pytest.raises(LlamboError, match="queue is full") as caught:
                await client.generate("refuse: the queue is full")
            assert (caught.value.code, caught.value.retry_after_ms) == (Code.BUSY, 250)
            with pytest.raises(LlamboError):
                await client.submit("refuse: again")

    async def test_an_answer_that_ends_in_an_error_raises_after_its_tokens(self, broker: DoubleBroker) -> None:
        async with Client(broker.address) as client:
            stream = client.stream("fail: a b")
            texts: list[str] = []

            async def read() -> None:
                async for piece in stream:
                    texts.append(piece.text)

            with pytest.raises(LlamboError, match="died twice") as caught:
                await read()
            assert "".join(texts) == "a b "
            assert caught.value.code is Code.ENGINE_FAILED
            assert stream.answer is not None
            assert stream.answer.reason == "error"

    @pytest.mark.parametrize(
        "options",
        [
            {"max_tokens": 0},
            {"max_tokens": "many"},
            {"temperature": -1},
            {"priority": "urgent"},
            {"seed": -1},
            {"stop": [""]},
            {"stop": ["x"] * 17},
            {"temprature": 1.0},
        ],
    )
    async def test_bad_options_are_refused_here(self, broker: DoubleBroker, options: dict[str, Any]) -> None:
        async with Client(broker.address) as client:
            with pytest.raises(LlamboError) as caught:
                client.stream("words: a", **options)
            assert caught.value.code is Code.BAD_REQUEST
        assert broker.runs == {}

    async def test_a_prompt_that_is_too_long(self, broker: DoubleBroker) -> None:
        async with Client(broker.address) as client:
            with pytest.raises(LlamboError) as caught:
                await client.generate("x" * (4 * 1024 * 1024 + 1))
            assert caught.value.code is Code.TOO_LONG

    def test_a_client_that_is_not_connected(self) -> None:
        with pytest.raises(LlamboError, match="not connected"):
            Client().stream("words: a")


class TestQuestions:
    async def test_answers_of_one_page_and_of_several(self, broker: DoubleBroker) -> None:
        async with Client(broker.address) as client:
            assert await client.status() == MeshStatus(broker="double", workers=1)
            assert await client.query("status") == {"broker": "double", "workers": 1}
            assert len(await client.workers()) == 100
            assert await client.drain("w1") == DrainReply(worker="w1", draining=True)

    async def test_a_problem_is_raised(self, broker: DoubleBroker) -> None:
        async with Client(broker.address) as client:
            with pytest.raises(LlamboError, match="what is why"):
                await client.why("abcd")

    async def test_no_answer_in_time(self, broker: DoubleBroker) -> None:
        async with Client(broker.address, query_ms=100) as client:
            with pytest.raises(LlamboError) as caught:
                await client.events()
            assert caught.value.code is Code.TIMEOUT


class TestSync:
    def test_generate_and_stream(self, broker: DoubleBroker) -> None:
        with SyncClient(broker.address) as client:
            assert client.generate("words: the cat sat").text == "the cat sat "
            stream = client.stream("words: the cat sat")
            assert "".join(piece.text for piece in stream) == "the cat sat "
            assert stream.answer is not None
            assert client.status().broker == "double"
            id = client.submit("words: a b")
            assert client.attach(id).result().text == "a b "

    def test_leaving_the_loop_early_cancels(self, broker: DoubleBroker) -> None:
        with SyncClient(broker.address) as client:
            for _ in client.stream("endless:"):
                break
            wait_for(broker.cancelled, "the cancel")

    def test_ctrl_c_cancels(self, broker: DoubleBroker) -> None:
        # Given a program that waits for an answer without end, and does not ignore what is pressed
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

        def interrupt(run: Run) -> None:
            os.kill(os.getpid(), signal.SIGINT)

        broker.on_request = interrupt
        # When Ctrl-C is pressed
        with pytest.raises(KeyboardInterrupt), SyncClient(broker.address) as client:
            client.generate("endless:")
        # Then the request is cancelled, and nothing hangs
        wait_for(broker.cancelled, "the cancel")

    def test_no_broker_answers(self) -> None:
        context: zmq.Context[Any] = zmq.Context()
        _control, _out, port = bind_both(context)
        with pytest.raises(LlamboError), SyncClient(f"tcp://127.0.0.1:{port}", connect_ms=50):
            pass
        context.destroy(linger=0)

    def test_a_client_that_is_closed(self, broker: DoubleBroker) -> None:
        with SyncClient(broker.address) as client:
            pass
        with pytest.raises(LlamboError, match="not connected"):
            client.generate("words: a")


@pytest.mark.parametrize("name", ["raw_client.py", "stream.py", "sync.py"])
def test_the_examples_print_an_answer(broker: DoubleBroker, name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), broker.address, "words: the cat sat"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.startswith("the cat sat \n")
    assert done.returncode == 0


def test_the_public_names_are_there() -> None:
    import llambo

    assert llambo.Stream is Stream
    assert all(getattr(llambo, name) is not None for name in llambo.__all__)
    with pytest.raises(AttributeError):
        _ = llambo.Nothing
