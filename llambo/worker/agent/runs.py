"""The runs a worker holds: one for each dispatch it accepted, until its END is acknowledged."""

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
        RunState.GONE: "refused by the engine, engine lost or no broker adopts it",
    },
    RunState.RUNNING: {
        RunState.ENDED: "last token or cancelled",
        RunState.GONE: "engine lost or no broker adopts it",
    },
    RunState.ENDED: {RunState.GONE: "END acknowledged or no broker adopts it"},
    RunState.GONE: {},
}

#: Header and body overhead of a chunk.
CHUNK_OVERHEAD_BYTES = 64
#: With less room than this no further chunk is begun.
MIN_CHUNK_BYTES = 1024


class RunTokens:
    """Ids and text from token index `base` on, about 13 bytes each and no object. Logprobs are stored encoded."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.end = base
        self._ids = array("i")
        self._text = bytearray()
        self._ends = array("Q")
        self._logprobs: list[bytes] | None = None
        #: Where each ends when all are concatenated, to compute how many fit into a chunk.
        self._logprob_ends = array("Q")

    @classmethod
    def of(cls, dispatch: m.Dispatch, chunks: list[bytes]) -> RunTokens:
        """With the tokens of the prefix, if their text came with the dispatch."""
        bodies = [tokens.decode_body(chunk[tokens.HEAD_BYTES :]) for chunk in chunks]
        # The chunks may come from a client: tokens without the logprobs that the request asks for, or the reverse.
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
            self._append_logprobs(logprobs)
        text, ends = self._text, self._ends
        for piece in pieces:
            text += piece
            ends.append(len(text))
        self.end += len(ids)

    def _append_logprobs(self, logprobs: Sequence[tokens.Logprob]) -> None:
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
        """Tokens from `first` on: at least one, at most as many as fit into one chunk and the budget."""
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
    """`key` is request id + dispatch id. Tokens before `tokens.base` came with the dispatch, without their text."""

    key: bytes
    link: int
    tokens: RunTokens
    #: Stored in case no broker knows the request any more.
    dispatched: m.Dispatch
    prompt: bytes
    deadline_at: int = 0
    #: Not 0: its broker is gone, and until then another one may adopt the run.
    orphan_at: int = 0
    state: RunState = RunState.STARTING
    end: m.End | None = None
    resend_at: int = 0
    #: False: the run produces the result of a task, which is sent on control with the END.
    published: bool = True
    #: When it was handed to the engine.
    started_at: int = 0

    @property
    def active(self) -> bool:
        return self.state is RunState.STARTING or self.state is RunState.RUNNING

    @property
    def suspect(self) -> bool:
        """An engine may have died of it, and it has not passed that token since."""
        suspect = self.dispatched.suspect
        return self.active and suspect is not None and self.tokens.end <= suspect

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
        """One page of a replay, in as few chunks as possible; the broker asks for the next page."""
        total = self.tokens.end
        until = min(until, total) if until else total
        first = min(max(first, self.tokens.base), total)
        chunks, after = self.chunks(first, until, limits.PAGE_BYTES)
        return m.Page(self.id, first, after, total, chunks, self.dispatch)

    def chunks(self, first: int, until: int, budget_bytes: int) -> tuple[list[bytes], int]:
        """These tokens in as few chunks as possible, within the budget, and the index after them."""
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
    """All runs, with counts that the hot path must not have to search for."""

    runs: dict[bytes, Run] = field(default_factory=dict)
    #: Runs that have a slot of the engine.
    active: int = 0
    #: Those of them that produce an answer, not a result.
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

    def serves(self, link: int) -> bool:
        """Whether there is a run of this link."""
        return any(run.link == link and not run.orphan_at for run in self.runs.values())

    def claims(self, link: int) -> dict[bytes, int]:
        return {run.key: run.tokens.end for run in self.of_link(link)}

    def has_suspect(self, except_link: int = -1) -> bool:
        """Whether a suspect is running that did not come from this link."""
        return any(run.suspect and (run.link != except_link or run.orphan_at) for run in self.runs.values())

    def busy_elsewhere(self, link: int) -> int:
        """Slots taken by runs of other links."""
        return self.active - sum(run.active for run in self.of_link(link))
