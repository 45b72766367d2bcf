"""From what the engine says to an acknowledged END: publishing, keeping, repeating, letting go.

Tokens are published once, on a plane that may lose them, and kept until the END of their run is acknowledged, so
that any part can be asked for again. The END itself is said on control, and said again until somebody has it.
"""

from __future__ import annotations

from collections import deque

from llambo.mesh.link.link_core import LinkCore, Publish
from llambo.mesh.wire import limits, tokens
from llambo.mesh.wire import messages as m
from llambo.worker.agent.actions import Action, Log, StopRun
from llambo.worker.agent.engine_life import NEVER_MS
from llambo.worker.agent.rate import Rate
from llambo.worker.agent.runs import Run, RunState, RunTable
from llambo.worker.engine.protocol import Output

#: An END that nobody acknowledged is said again after this long.
END_AGAIN_MS = 500
#: From the word of an engine to its reading what it is to do next, on a machine that is busy.
UNREAD_MS = 250


class Delivery:
    """`links` and `out` belong to the core."""

    def __init__(self, links: dict[int, LinkCore], rate: Rate, out: list[Action]) -> None:
        self.runs = RunTable()
        self._links = links
        self._rate = rate
        self._out = out
        #: When to say the END of which run again. All wait equally long, so order of entry is order of time.
        self._resend: deque[tuple[int, bytes]] = deque()

    # --- from the engine -----------------------------------------------------------------------------

    def on_outputs(self, outputs: list[Output], now_ms: int) -> None:
        """The hot path: one frame for each run, one order for each link."""
        runs = self.runs.runs
        frames: dict[int, list[bytes]] = {}
        ended: list[tuple[Run, m.End]] = []
        for output in outputs:
            run = runs.get(output.key)
            if run is None or run.end is not None:
                continue  # cancelled or dropped while this was on its way
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
        for number, said in frames.items():
            if self._links[number].welcomed:
                self._out.append(Publish(number, said))
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

    def lose(self, text: str, heard_ms: int, *, outside: bool = False) -> None:
        """The engine is gone and what it was doing with it; what had ended is still ours to deliver.

        One that was given to it after its last word, by more than a moment, it has never seen: it reads between two
        steps, and speaks after each. Such a run is not named; the next beat does not claim it, and that is all.
        """
        self._rate.begin_again()
        lost: dict[int, list[Run]] = {}
        for run in self.runs.active_runs():
            if not run.orphan_at and run.given_at <= heard_ms + UNREAD_MS:
                lost.setdefault(run.link, []).append(run)
            self._out.append(Log(f"a request has lost its engine after {run.tokens.end} tokens", request=run.id))
            self.runs.drop(run)
        for number, runs in lost.items():
            if self._links[number].welcomed:
                keys, made = [run.key for run in runs], [run.tokens.end for run in runs]
                self._links[number].send(m.EngineLost(keys, text[:1024], made, outside))

    # --- from the broker -----------------------------------------------------------------------------

    def on_replay(self, number: int, replay: m.Replay) -> None:
        run = self.runs.get(replay.id + replay.dispatch)
        if run is not None:
            self._links[number].send(run.page(replay.first, replay.until))

    def on_cancel(self, number: int, cancel: m.Cancel, now_ms: int) -> None:
        run = self.runs.get(cancel.id + cancel.dispatch)
        if run is not None and run.orphan_at:
            run.link, run.orphan_at = number, 0  # whoever knows that it is not needed may say so
        if run is None or run.link != number:  # another broker has adopted it meanwhile
            self._links[number].send(m.End(cancel.id, 0, "cancelled", cancel.dispatch))
        elif run.end is not None:
            self.say_end(run, run.end, now_ms)
        else:
            # The engine reads its orders in this order, so the slot is free for whatever is started next.
            self._out.append(StopRun(run.key))
            self._finish(run, m.End(run.id, run.tokens.end, "cancelled", run.dispatch), now_ms)

    def on_ack(self, number: int, ack: m.EndAck) -> None:
        for key in ack.ids:
            run = self.runs.get(key)
            if run is not None and run.end is not None and run.link == number:
                self.runs.drop(run)

    # --- the end -------------------------------------------------------------------------------------

    def _finish(self, run: Run, end: m.End, now_ms: int) -> None:
        self.runs.end(run, end)
        if not run.published and run.tokens.end and not run.orphan_at and self._links[run.link].welcomed:
            # Most results are one page: with it just before the END nobody has to ask for anything.
            self._links[run.link].send(run.page(0, 0))
        self.say_end(run, end, now_ms)

    def say_end(self, run: Run, end: m.End, now_ms: int) -> None:
        if run.orphan_at:
            return  # it is said to whoever adopts it
        if self._links[run.link].welcomed:
            self._links[run.link].send(end)
        run.resend_at = now_ms + END_AGAIN_MS
        self._resend.append((run.resend_at, run.key))

    def tick(self, now_ms: int) -> None:
        while self._resend and self._resend[0][0] <= now_ms:
            at, key = self._resend.popleft()
            run = self.runs.get(key)
            if run is not None and run.end is not None and run.resend_at == at:
                self.say_end(run, run.end, now_ms)

    def waiting_ends(self) -> list[tuple[int, bytes]]:
        return list(self._resend)

    def next_wakeup_ms(self) -> int:
        return self._resend[0][0] if self._resend else NEVER_MS
