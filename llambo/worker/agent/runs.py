"""The runs a worker holds: one for each dispatch it took, until its END is acknowledged."""

from __future__ import annotations

import enum
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from llambo.mesh.wire import limits, tokens, transfer
from llambo.mesh.wire import messages as m


class RunState(enum.Enum):
    STARTING = "starting"
    RUNNING = "running"
    ENDED = "ended"
    GONE = "gone"


#: Every legal step. The diagram in ARCHITECTURE.md is drawn from this table.
RUN_STEPS: dict[RunState, dict[RunState, str]] = {
    RunState.STARTING: {
        RunState.RUNNING: "first output of the engine",
        RunState.ENDED: "cancelled",
        RunState.GONE: "refused by the engine, engine lost or nobody adopts it",
    },
    RunState.RUNNING: {
        RunState.ENDED: "last token or cancelled",
        RunState.GONE: "engine lost or nobody adopts it",
    },
    RunState.ENDED: {RunState.GONE: "END acknowledged or nobody adopts it"},
    RunState.GONE: {},
}

#: Header and body overhead of a chunk.
CHUNK_OVERHEAD_BYTES = 64
#: Less room than this is not worth another chunk.
MIN_CHUNK_BYTES = 1024


class Tokens:
    """Ids and text from token index `base` on: 13 bytes or so for each, no object. Logprobs, if any, encoded."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.end = base
        self._ids = array("i")
        self._text = bytearray()
        self._ends = array("Q")
        self._logprobs: list[bytes] | None = None
        #: Where each would end if all stood in a row, to know how many fit.
        self._logprob_ends = array("Q")

    @classmethod
    def of(cls, dispatch: m.Dispatch, chunks: list[bytes]) -> Tokens:
        """Those that exist already, with their text if it came with them."""
        bodies = [tokens.decode_body(chunk[tokens.HEAD_BYTES :]) for chunk in chunks]
        # A client may give back what it likes: tokens without the logprobs it has asked for, or the reverse.
        alike = all((body.logprobs is None) == (dispatch.logprobs is None) for body in bodies)
        if transfer.count(chunks) != len(dispatch.prefix) or not alike:
            return cls(len(dispatch.prefix))
        existing = cls(0)
        for body in bodies:
            existing.extend(body.ids, body.pieces, body.logprobs)
        return existing

    def extend(
        self, ids: Sequence[int], pieces: Sequence[bytes], logprobs: Sequence[tokens.Logprob] | None = None
    ) -> None:
        self._ids.extend(ids)
        if logprobs is not None:
            self._keep(logprobs)
        text, ends = self._text, self._ends
        for piece in pieces:
            text += piece
            ends.append(len(text))
        self.end += len(ids)

    def _keep(self, logprobs: Sequence[tokens.Logprob]) -> None:
        if self._logprobs is None:
            self._logprobs = []
        end = self._logprob_ends[-1] if self._logprob_ends else 0
        for logprob in logprobs:
            self._logprobs.append(tokens.encode_logprob(logprob))
            end += len(self._logprobs[-1])
            self._logprob_ends.append(end)

    def chunk(
        self, first: int, until: int, budget_bytes: int
    ) -> tuple[list[int], list[bytes], list[msgspec.Raw] | None]:
        """Tokens from `first` on, at least one, as many as fit into one chunk and the budget."""
        low, high = first - self.base, min(until - self.base, first - self.base + limits.CHUNK_TOKENS)
        high = low + self._fitting(low, high, min(budget_bytes, limits.TOKEN_FRAME_BYTES) - CHUNK_OVERHEAD_BYTES)
        start, pieces = self._start(low), []
        for end in self._ends[low:high]:
            pieces.append(bytes(self._text[start:end]))
            start = end
        logprobs = None if self._logprobs is None else [msgspec.Raw(each) for each in self._logprobs[low:high]]
        return self._ids[low:high].tolist(), pieces, logprobs

    def _start(self, position: int) -> int:
        return self._ends[position - 1] if position else 0

    def _logprob_bytes(self, low: int, high: int) -> int:
        ends = self._logprob_ends
        return ends[high - 1] - (ends[low - 1] if low else 0) if ends else 0

    def _fitting(self, low: int, high: int, budget_bytes: int) -> int:
        start = self._start(low)

        def size(position: int) -> int:
            text = self._ends[position] - start + (position - low + 1) * transfer.TOKEN_OVERHEAD_BYTES
            return text + self._logprob_bytes(low, position + 1)

        return max(1, bisect_right(range(low, high), budget_bytes, key=size))


@dataclass(slots=True)
class Run:
    """`key` is request id + dispatch id. Tokens before `tokens.base` came with the dispatch and without their text."""

    key: bytes
    link: int
    tokens: Tokens
    #: What was asked for, in case that nobody else knows it any more.
    work: m.Dispatch
    prompt: bytes
    deadline_at: int = 0
    #: Its broker is gone: until then it waits for one that adopts it.
    orphan_at: int = 0
    state: RunState = RunState.STARTING
    end: m.End | None = None
    resend_at: int = 0
    #: False: it makes a result and not an answer, and that goes with the END, on control.
    published: bool = True
    #: When the engine was told of it.
    given_at: int = 0

    @property
    def active(self) -> bool:
        return self.state is RunState.STARTING or self.state is RunState.RUNNING

    @property
    def suspect(self) -> bool:
        """An engine may have died of it, and it has not got past that token since."""
        return self.active and self.work.suspect is not None and self.tokens.end <= self.work.suspect

    @property
    def id(self) -> bytes:
        return self.key[: limits.REQUEST_ID_BYTES]

    @property
    def dispatch(self) -> bytes:
        return self.key[limits.REQUEST_ID_BYTES :]

    def step(self, state: RunState) -> None:
        assert state in RUN_STEPS[self.state], f"run cannot go from {self.state} to {state}"
        self.state = state

    def page(self, first: int, until: int) -> m.Page:
        """Tokens again, in as few chunks as they fit into, up to one page; the broker pulls the next."""
        total = self.tokens.end
        until = min(until, total) if until else total
        first = min(max(first, self.tokens.base), total)
        chunks, after = self.chunks(first, until, limits.PAGE_BYTES)
        return m.Page(self.id, first, after, total, chunks, self.dispatch)

    def chunks(self, first: int, until: int, budget_bytes: int) -> tuple[list[bytes], int]:
        """As few chunks as hold these tokens, within the budget, and the index after them."""
        chunks: list[bytes] = []
        at = first
        while at < until and len(chunks) < limits.PAGE_CHUNKS and budget_bytes > MIN_CHUNK_BYTES:
            ids, pieces, logprobs = self.tokens.chunk(at, until, budget_bytes)
            chunk = tokens.encode_chunk(self.key, at, ids, pieces, self._flags(at + len(ids)), logprobs)
            if chunks and len(chunk) > budget_bytes:
                break
            chunks.append(chunk)
            budget_bytes -= len(chunk)
            at += len(ids)
        return chunks, at

    def _flags(self, index: int) -> int:
        return tokens.final_flags(self.end.reason) if self.end is not None and index == self.tokens.end else 0


@dataclass(slots=True)
class RunTable:
    """All runs, with the counts that must not be searched for."""

    runs: dict[bytes, Run] = field(default_factory=dict)
    #: Runs that have a slot of the engine.
    active: int = 0
    #: Those of them that make tokens.
    streams: int = 0

    def get(self, key: bytes) -> Run | None:
        return self.runs.get(key)

    def __len__(self) -> int:
        return len(self.runs)

    def add(self, run: Run) -> None:
        self.runs[run.key] = run
        self.active += 1
        self.streams += run.published

    def end(self, run: Run, end: m.End) -> None:
        run.step(RunState.ENDED)
        run.end = end
        self.active -= 1
        self.streams -= run.published

    def drop(self, run: Run) -> None:
        self.active -= run.active
        self.streams -= run.active and run.published
        run.step(RunState.GONE)
        del self.runs[run.key]

    def active_runs(self) -> list[Run]:
        return [run for run in self.runs.values() if run.active]

    def of_link(self, link: int) -> list[Run]:
        return [run for run in self.runs.values() if run.link == link and not run.orphan_at]

    def orphans(self) -> list[Run]:
        return [run for run in self.runs.values() if run.orphan_at]

    def claims(self, link: int) -> dict[bytes, int]:
        return {run.key: run.tokens.end for run in self.of_link(link)}

    def suspects(self, but_link: int = -1) -> bool:
        """Whether one is aboard, other than what this broker has given."""
        return any(run.suspect and (run.link != but_link or run.orphan_at) for run in self.runs.values())

    def busy(self, link: int) -> int:
        """Slots that this broker has not given away itself."""
        return self.active - sum(run.active for run in self.of_link(link))
