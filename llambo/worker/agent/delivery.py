"""From the outputs of the engine to an acknowledged END: publish, store, replay, repeat the END, drop.

Tokens are published once, on a plane that may lose them, and stored until the END of their run is acknowledged, so
that any part can be asked for again. The END itself is sent on control, and repeated until it is acknowledged.

`Orphans` are the runs whose broker is gone. A broker that dies loses all it knew. Its worker knows the run too: the
request, the prompt, each token so far. So a run that has lost its link goes on, and is offered to every other broker at
once, and to each one that welcomes this worker later. It belongs to the first that adopts it: its tokens are published
there from then on, and those made in the meantime are fetched by replay. A run that no broker adopts within `orphan_ms`
is stopped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import msgspec

from llambo.mesh.link.link_core import LinkCore, Publish
from llambo.mesh.wire import limits, tokens, transfer
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.timers import NEVER_MS
from llambo.worker.agent.events import Action, Log, StopRun
from llambo.worker.agent.runs import Run, RunState, RunTable
from llambo.worker.engine.protocol import Output

#: An END that was not acknowledged is sent again after this long.
END_AGAIN_MS = 500
#: From an output of the engine until it has read its next orders, on a machine that is busy.
UNREAD_MS = 250
#: The rate of the worker is measured over this time.
RATE_WINDOW_MS = 1_000
#: Longer for the pace of streams, so that waiting for a first token counts beside the tokens that follow.
PACE_WINDOW_MS = 3_000
#: With less stream time than this in the window the pace is unknown.
MEASURABLE_MS = 200


class TokenRate:
    """Tokens per second in the recent past: of the worker, and of one of its streams.

    The owner adds to `count` and reports how time passes. Each `sample` is measured against earlier ones.
    """

    def __init__(self) -> None:
        self.count = 0
        #: Of the worker, when it was last measured.
        self.last = 0.0
        #: Time of all streams together.
        self._stream_ms = 0
        self._now_ms = 0
        self._samples: deque[tuple[int, int, int]] = deque()

    def reset(self) -> None:
        """The engine is another one: what was measured before says nothing about it."""
        self._samples.clear()

    def on_time_passed(self, streams: int, now_ms: int) -> None:
        """The engine had this many streams until now."""
        if streams:
            self._stream_ms += streams * (now_ms - self._now_ms)
        self._now_ms = now_ms

    def sample(self, now_ms: int) -> tuple[float, float]:
        """Of the worker, and of one stream; 0: unknown."""
        samples, now = self._samples, (now_ms, self.count, self._stream_ms)
        samples.append(now)
        while len(samples) > 2 and now_ms - samples[1][0] >= PACE_WINDOW_MS:
            samples.popleft()
        recent = next((each for each in reversed(samples) if now_ms - each[0] >= RATE_WINDOW_MS), samples[0])
        whole = (self.count - recent[1]) * 1000 / (now_ms - recent[0]) if now_ms > recent[0] else 0.0
        stream_ms = self._stream_ms - samples[0][2]
        pace = (self.count - samples[0][1]) * 1000 / stream_ms if stream_ms >= MEASURABLE_MS else 0.0
        self.last = round(whole, 1)
        return self.last, round(pace, 2)


class Delivery:
    """`links` and `out` belong to the core."""

    def __init__(self, links: dict[int, LinkCore], rate: TokenRate, out: list[Action]) -> None:
        self.runs = RunTable()
        self._links = links
        self._rate = rate
        self._out = out
        #: When to send the END of which run again. All wait equally long, so they are in order of time.
        self._resend: deque[tuple[int, bytes]] = deque()

    # From the engine.

    def on_outputs(self, outputs: list[Output], now_ms: int) -> None:
        """The hot path: one frame for each run, one action for each link."""
        runs = self.runs.runs
        frames: dict[int, list[bytes]] = {}
        ended: list[tuple[Run, m.End]] = []
        for output in outputs:
            run = runs.get(output.key)
            if run is None or run.end is not None:
                continue  # it was cancelled or dropped while this output was on its way
            if run.state is RunState.STARTING:
                run.step(RunState.RUNNING)
            if output.ids:
                self._append(run, output, [] if run.orphan_at else frames.setdefault(run.link, []))
            if output.end is not None:
                end = m.End(
                    run.id, run.tokens.end, output.end, run.dispatch, output.usage or m.Usage(), output.error,
                    stop=output.stop,
                )  # fmt: skip
                ended.append((run, end))
        for number, published in frames.items():
            if self._links[number].welcomed:
                self._out.append(Publish(number, published))
        for run, end in ended:
            self._finish(run, end, now_ms)

    def _append(self, run: Run, output: Output, frames: list[bytes]) -> None:
        first = run.tokens.end
        run.tokens.extend(output.ids, output.pieces, output.logprobs)
        if not run.published:
            return
        self._rate.count += len(output.ids)
        flags = tokens.final_flags(output.end)
        frame = tokens.encode_chunk(run.key, first, output.ids, output.pieces, flags, output.logprobs)
        if len(frame) <= limits.TOKEN_FRAME_BYTES:
            frames.append(frame)
        else:
            frames += run.chunks(first, run.tokens.end, 2 * len(frame))[0]

    def on_engine_lost(self, text: str, last_alive_ms: int, *, outside: bool = False) -> None:
        """Drop the runs that the engine had. Runs that have ended are still delivered.

        A run that was started more than UNREAD_MS after the last output was never read by the engine, which reads
        between two steps and sends something after each. Such a run is not reported as lost with the engine, because
        it cannot be the cause; the next heartbeat does not claim it, so the broker dispatches it again.
        """
        self._rate.reset()
        lost: dict[int, list[Run]] = {}
        for run in self.runs.active_runs():
            if not run.orphan_at and run.started_at <= last_alive_ms + UNREAD_MS:
                lost.setdefault(run.link, []).append(run)
            self._out.append(Log(f"a request has lost its engine after {run.tokens.end} tokens", request=run.id))
            self.runs.drop(run)
        for number, runs in lost.items():
            if self._links[number].welcomed:
                keys, made = [run.key for run in runs], [run.tokens.end for run in runs]
                self._links[number].send(m.EngineLost(keys, text[:1024], made, outside))

    # From brokers.

    def on_replay(self, number: int, replay: m.Replay) -> None:
        run = self.runs.get(replay.id + replay.dispatch)
        if run is not None:
            self._links[number].send(run.page(replay.first, replay.until))

    def on_cancel(self, number: int, cancel: m.Cancel, now_ms: int) -> None:
        run = self.runs.get(cancel.id + cancel.dispatch)
        if run is not None and run.orphan_at:
            run.link, run.orphan_at = number, 0  # any broker that knows the run may cancel an orphan
        if run is None or run.link != number:  # another broker has adopted it meanwhile
            self._links[number].send(m.End(cancel.id, 0, "cancelled", cancel.dispatch))
        elif run.end is not None:
            self.send_end(run, run.end, now_ms)
        else:
            # The engine reads its orders in this sequence, so the slot is free for the next run.
            self._out.append(StopRun(run.key))
            self._finish(run, m.End(run.id, run.tokens.end, "cancelled", run.dispatch), now_ms)

    def on_ack(self, number: int, ack: m.EndAck) -> None:
        for key in ack.ids:
            run = self.runs.get(key)
            if run is not None and run.end is not None and run.link == number:
                self.runs.drop(run)

    # The END.

    def _finish(self, run: Run, end: m.End, now_ms: int) -> None:
        self.runs.end(run, end)
        if not run.published and run.tokens.end and not run.orphan_at and self._links[run.link].welcomed:
            # Most results are one page. When it arrives just before the END, no replay is needed.
            self._links[run.link].send(run.page(0, 0))
        self.send_end(run, end, now_ms)

    def send_end(self, run: Run, end: m.End, now_ms: int) -> None:
        if run.orphan_at:
            return  # it is sent to the broker that adopts the run
        if self._links[run.link].welcomed:
            self._links[run.link].send(end)
        run.resend_at = now_ms + END_AGAIN_MS
        self._resend.append((run.resend_at, run.key))

    def tick(self, now_ms: int) -> None:
        while self._resend and self._resend[0][0] <= now_ms:
            at, key = self._resend.popleft()
            run = self.runs.get(key)
            if run is not None and run.end is not None and run.resend_at == at:
                self.send_end(run, run.end, now_ms)

    def waiting_ends(self) -> list[tuple[int, bytes]]:
        return list(self._resend)

    def next_wakeup_ms(self) -> int:
        return self._resend[0][0] if self._resend else NEVER_MS


class Orphans:
    """`links`, `delivery` and `out` belong to the core."""

    def __init__(self, links: Mapping[int, LinkCore], delivery: Delivery, out: list[Action], orphan_ms: int) -> None:
        self._links = links
        self._delivery = delivery
        self._out = out
        self._orphan_ms = orphan_ms
        #: When the first of them has to be stopped.
        self._due_at = NEVER_MS

    def on_link_lost(self, number: int, now_ms: int) -> None:
        lost = []
        for run in self._delivery.runs.of_link(number):
            if run.end is not None and run.end.reason == "cancelled":
                # Its client knows that already. To another broker it would look like an answer that was cut short.
                self._delivery.runs.drop(run)
                continue
            lost.append(run)
            run.orphan_at = now_ms + self._orphan_ms
            self._out.append(Log(f"a request has lost its broker at {run.tokens.end} tokens", request=run.id))
            self._due_at = min(self._due_at, run.orphan_at)
        if lost:
            self._out.append(Log(f"{len(lost)} runs have lost their broker; they go on for {self._orphan_ms} ms"))
        for other, link in self._links.items():
            if other != number and link.welcomed:
                self._offer(lost, other, now_ms)

    def on_welcome(self, number: int, now_ms: int) -> None:
        self._offer(self._delivery.runs.orphans(), number, now_ms)

    def adopt(self, number: int, adopt: m.Adopt, now_ms: int) -> None:
        """If another broker was faster, or the run was stopped, the broker learns it from the next beat's claims."""
        run = self._delivery.runs.get(adopt.id + adopt.dispatch)
        if run is None or not run.orphan_at:
            return
        run.link, run.orphan_at = number, 0
        if run.end is not None:
            self._delivery.send_end(run, run.end, now_ms)

    def tick(self, now_ms: int) -> None:
        if now_ms < self._due_at:
            return
        self._due_at = NEVER_MS
        for run in self._delivery.runs.orphans():
            if now_ms >= run.orphan_at:
                self._drop(run)
            else:
                self._due_at = min(self._due_at, run.orphan_at)

    def next_wakeup_ms(self) -> int:
        return self._due_at

    def _offer(self, runs: list[Run], number: int, now_ms: int) -> None:
        for run in runs:
            if run.tokens.base:
                continue  # the text before `base` is unknown here, so the answer cannot be completed from this run
            chunks, after = run.chunks(0, run.tokens.end, limits.CONTROL_FRAME_BYTES - len(run.prompt))
            if after < run.tokens.end:
                continue  # too large for one frame
            blob, prompt_bytes = transfer.pack(run.prompt, chunks)
            left = max(1, run.deadline_at - now_ms) if run.deadline_at else 0
            work = msgspec.structs.replace(run.dispatched, prefix=[], prompt_bytes=prompt_bytes, deadline_ms=left)
            self._links[number].send(m.Orphan(work, run.link == number), blob)

    def _drop(self, run: Run) -> None:
        self._out.append(Log("a request is dropped: no broker has adopted it", warning=True, request=run.id))
        if run.end is None:
            self._out.append(StopRun(run.key))
        self._delivery.runs.drop(run)
