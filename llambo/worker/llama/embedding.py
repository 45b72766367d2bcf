"""Which texts go into the next step of the embedding context. Pure, without a model.

Embeddings have a context of their own, separate from that of the answers and its cached prefixes. Texts wait in order.
As many as fit share a step, each as a sequence of its own, and a long text is split across steps. So a step stays
short, and running answers wait for one at most.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]


@dataclass(slots=True)
class Job:
    """One task: its texts as tokens, and their vectors."""

    key: bytes
    texts: list[list[int]]
    pooling: str
    deadline_ms: int
    vectors: list[NDArray[np.float64] | None] = field(default_factory=list)
    #: The first texts, this many, are in progress or done.
    begun: int = 0
    left: int = 0

    def __post_init__(self) -> None:
        self.vectors = [None] * len(self.texts)
        self.left = len(self.texts)


@dataclass(slots=True)
class OpenText:
    """A text in progress, as a sequence of the context."""

    job: Job
    number: int
    sequence: int
    at: int = 0
    total: NDArray[np.float64] | None = None

    @property
    def tokens(self) -> list[int]:
        return self.job.texts[self.number]


@dataclass(slots=True)
class EmbedPlan:
    """One step as columns. `shares`: the text of each group of rows, and its size."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    shares: list[tuple[OpenText, int]] = field(default_factory=list)


class EmbedQueue:
    """`cells`: the most tokens of all open texts together, and of one text."""

    def __init__(self, cells: int, sequences: int) -> None:
        self.jobs: dict[bytes, Job] = {}
        self.cells = cells
        self._free = list(range(sequences))
        self._open: list[OpenText] = []

    def add(self, job: Job) -> None:
        assert all(0 < len(text) <= self.cells for text in job.texts), (
            "a text that does not fit should have been refused"
        )
        self.jobs[job.key] = job

    def drop(self, key: bytes) -> list[int]:
        """Returns the sequences whose cells have to be freed."""
        if self.jobs.pop(key, None) is None:
            return []
        dropped = [text for text in self._open if text.job.key == key]
        self._close(dropped)
        return [text.sequence for text in dropped]

    def plan(self, rows: int) -> EmbedPlan | None:
        """The next step with at most `rows` rows; None if no text waits."""
        plan = EmbedPlan()
        for text in self._open:
            self._share(plan, text, rows)
        for job in self.jobs.values():
            while job.begun < len(job.texts) and len(plan.tokens) < rows and self._fits(len(job.texts[job.begun])):
                text = OpenText(job, job.begun, self._free.pop())
                job.begun += 1
                self._open.append(text)
                self._share(plan, text, rows)
            if job.begun < len(job.texts):
                break  # first come, first served
        return plan if plan.tokens else None

    def done(self, plan: EmbedPlan, rows: Rows) -> tuple[list[Job], list[int]]:
        """Takes the rows of a step. Returns the complete jobs, and the sequences whose cells have to be freed."""
        at, closed = 0, []
        for text, count in plan.shares:
            mine = rows[at : at + count]
            at += count
            text.at += count
            whole = text.at == len(text.tokens)
            if text.job.pooling == "mean":
                # In double precision, so that the division into steps does not change the result.
                summed = mine.sum(axis=0, dtype=np.float64)
                text.total = summed if text.total is None else text.total + summed
                if whole:
                    text.job.vectors[text.number] = text.total / len(text.tokens)
            elif whole:
                text.job.vectors[text.number] = mine[-1].astype(np.float64)
            if whole:
                text.job.left -= 1
                closed.append(text)
        self._close(closed)
        complete = [job for job in self.jobs.values() if not job.left]
        for job in complete:
            del self.jobs[job.key]
        return complete, [text.sequence for text in closed]

    def _fits(self, tokens: int) -> bool:
        return bool(self._free) and sum(len(text.tokens) for text in self._open) + tokens <= self.cells

    def _share(self, plan: EmbedPlan, text: OpenText, rows: int) -> None:
        count = min(len(text.tokens) - text.at, rows - len(plan.tokens))
        if count > 0:
            plan.tokens += text.tokens[text.at : text.at + count]
            plan.positions += range(text.at, text.at + count)
            plan.sequences += [text.sequence] * count
            plan.shares.append((text, count))

    def _close(self, texts: list[OpenText]) -> None:
        for text in texts:
            self._open.remove(text)
            self._free.append(text.sequence)


def normalized(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    length = float(np.sqrt(vector @ vector))
    return vector / length if length else vector
