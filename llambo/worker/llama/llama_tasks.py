"""Tasks on a real model: tokens and model information at once, vectors and scores in steps.

A task ends like an answer, with an output that says `stop`. The pieces of that output are its whole result.

`EmbedQueue` decides which texts go into the next step, and knows no model. Embeddings have a context of their own,
separate from that of the answers and its cached prefixes. Tasks take turns, text by text. As many texts as fit share a
step, each as a sequence of its own, and a long text is split across steps if the model allows it (`embedder`). So a
step stays short, and running answers wait for one at most.

A reranker reads each document in one text with the query. Its score is the vector of that text.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llambo.mesh.wire import tasks
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.messages import Sampling, Usage
from llambo.mesh.wire.timers import NEVER_MS
from llambo.mesh.wire.tokens import UNDECODABLE
from llambo.worker.engine.protocol import (
    Output,
    Refused,
    Start,
    TaskRefused,
    TaskResult,
    check_size,
    decode_ids,
    decode_rerank,
    decode_texts,
    result_pieces,
    unreadable,
)
from llambo.worker.llama.prompt import BadPrompt, Template, chat_of, prompt_text

if TYPE_CHECKING:  # the queue of embeddings needs no llama.cpp
    from llambo.worker.llama.embedder import Embedder
    from llambo.worker.llama.llama import Model
    from llambo.worker.llama.reranking import PairPrompt

Rows = NDArray[np.float32]
#: Rows of a step while answers are running. It has to be short.
ROWS_BESIDE = 16
#: While answers are running, a step of embeddings takes about this share of one of their steps.
SHARE = 0.5
#: Weight of the newest measurement.
NEWEST = 0.25
#: What to do about a text that is too long.
SPLIT = "split it, or use a model with a longer context"
#: Upper bounds for the map of a result, and for the token count of each text.
OVERHEAD_BYTES, PER_TEXT_BYTES, PER_SCORE_BYTES = 256, 8, 16


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
    """`cells`: the most tokens of all open texts together, and of one text.

    `whole`: a text is not split across steps. `pooled`: a step gives a row for each of its texts, not for each token.
    """

    def __init__(self, cells: int, sequences: int, *, whole: bool = False, pooled: bool = False) -> None:
        self.jobs: dict[bytes, Job] = {}
        self.cells = cells
        self._whole, self._pooled = whole, pooled
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
        """The next step with at most `rows` rows, or one text that has more and is not split. None: no text waits."""
        plan = EmbedPlan()
        for text in self._open:
            self._share(plan, text, rows)
        while (job := self._next_job()) is not None and self._fits(plan, len(job.texts[job.begun]), rows):
            text = OpenText(job, job.begun, self._free.pop())
            job.begun += 1
            self._open.append(text)
            self._share(plan, text, rows)
            # It is at the end of the line now: a job of two texts does not wait for one of a thousand.
            self.jobs[job.key] = self.jobs.pop(job.key)
        return plan if plan.tokens else None

    def _next_job(self) -> Job | None:
        """The one whose turn it is. If its text does not fit, it is first in the next step, so none waits for ever."""
        return next((job for job in self.jobs.values() if job.begun < len(job.texts)), None)

    def done(self, plan: EmbedPlan, rows: Rows) -> tuple[list[Job], list[int]]:
        """Takes the rows of a step. Returns the complete jobs, and the sequences whose cells have to be freed."""
        at, closed = 0, []
        for text, count in plan.shares:
            height = 1 if self._pooled else count
            mine = rows[at : at + height]
            at += height
            text.at += count
            whole = text.at == len(text.tokens)
            if text.job.pooling == "mean" and not self._pooled:
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

    def _fits(self, plan: EmbedPlan, tokens: int, rows: int) -> bool:
        planned = len(plan.tokens)
        room = planned < rows if not self._whole else not planned or planned + tokens <= rows
        return (
            room and bool(self._free) and sum(len(text.tokens) for text in self._open) + tokens <= self.cells
        )  # fmt: skip

    def _share(self, plan: EmbedPlan, text: OpenText, rows: int) -> None:
        left = len(text.tokens) - text.at
        count = left if self._whole else min(left, rows - len(plan.tokens))
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


class NoRoom(Exception):
    """There is not enough memory for a context for embeddings; the text has the numbers."""


class Tasks:
    """`make_embedder` is called for the first embedding: most engines never need one. `pair`: of a reranker."""

    def __init__(
        self,
        model: Model,
        template: Template | None,
        *,
        context: int,
        make_embedder: Callable[[], Embedder],
        info: Callable[[], dict[str, Any]],
        pair: PairPrompt | None = None,
    ) -> None:
        self._model = model
        self._template = template
        self._context = context
        self._make_embedder = make_embedder
        self._info = info
        self._pair = pair
        self._embedder: Embedder | None = None
        self._queue: EmbedQueue | None = None
        self._starts: dict[bytes, tuple[Start, float]] = {}
        #: Finished tasks, until the next step returns their outputs.
        self._ready: dict[bytes, Output] = {}
        self._row_ms = 0.0

    @property
    def count(self) -> int:
        return len(self._ready) + len(self._starts)

    @property
    def pending(self) -> bool:
        return self.count > 0

    def start(self, start: Start, now_ms: int) -> Refused | None:
        began = time.perf_counter()
        try:
            if start.task == "embed":
                self._begin_embed(start, now_ms, began)
            elif start.task == "rerank":
                self._begin_rerank(start, now_ms, began)
            else:
                self._ready[start.key] = _whole(start, self._at_once(start), began)
        except TaskRefused as refusal:
            return Refused(start.key, refusal.info, final=True)
        except UNDECODABLE as error:
            return Refused(start.key, unreadable(start, error).info, final=True)
        except BadPrompt as error:
            return Refused(start.key, ErrorInfo(Code.BAD_REQUEST, str(error)), final=True)
        return None

    def stop(self, key: bytes) -> None:
        self._ready.pop(key, None)
        if self._starts.pop(key, None) is not None:
            self._drop(key)

    def step(self, now_ms: int, beside_ms: float) -> list[Output]:
        """Outputs of finished tasks. `beside_ms`: how long the step of the answers took; 0 if there was none."""
        outputs, self._ready = list(self._ready.values()), {}
        for start, began in list(self._starts.values()):
            assert self._queue is not None
            if now_ms >= self._queue.jobs[start.key].deadline_ms:
                self.stop(start.key)
                outputs.append(Output(start.key, [], [], "deadline", _usage(0, began)))
        if self._starts:
            outputs += self._embed(self._rows(beside_ms))
        return outputs

    def _at_once(self, start: Start) -> TaskResult:
        options = start.options
        match start.task:
            case "tokenize":
                form = Sampling(form=options.form, system=options.system)
                text, templated = prompt_text(start.prompt, chat_of(start.prompt, form), self._template)
                ids = self._model.tokenize(text, special=templated or options.special)
                return tasks.TokenizeResult(ids, [self._model.piece_or_name(id) for id in ids])
            case "detokenize":
                piece = self._model.piece_or_name if options.special else self._model.piece
                return tasks.DetokenizeResult(b"".join(piece(self._known(id)) for id in decode_ids(start.prompt)))
            case _:
                return self._info()

    def _known(self, id: int) -> int:
        if id >= self._model.tokens:
            raise TaskRefused(Code.BAD_REQUEST, f"there is no token {id}: the model has {self._model.tokens}")
        return id

    def _begin_embed(self, start: Start, now_ms: int, began: float) -> None:
        given = [text.encode() for text in decode_texts(start.prompt)]
        texts = [self._tokens(number, text) for number, text in enumerate(given)]
        size = OVERHEAD_BYTES + len(texts) * (4 * self._model.embedding_size + PER_TEXT_BYTES)
        check_size(start, size, f"{len(texts)} embeddings of {self._model.embedding_size} numbers")
        self._begin(start, texts, now_ms, began)

    def _tokens(self, number: int, text: bytes) -> list[int]:
        tokens = self._model.tokenize(text, special=False) if text else []
        if not tokens:
            raise TaskRefused(Code.BAD_REQUEST, f"text {number} is empty")
        if len(tokens) > self._context:
            problem = f"text {number} has {len(tokens)} tokens; the context has {self._context}"
            raise TaskRefused(Code.TOO_LONG, problem, SPLIT)
        return tokens

    def _begin_rerank(self, start: Start, now_ms: int, began: float) -> None:
        assert self._pair is not None, "refused by the engine"
        given = decode_rerank(start.prompt)
        texts = [self._pair.tokens(given.query, document) for document in given.documents]
        for number, text in enumerate(texts):
            if len(text) > self._context:
                problem = f"document {number} has {len(text)} tokens with the query; the context has {self._context}"
                raise TaskRefused(Code.TOO_LONG, problem, SPLIT)
        check_size(start, OVERHEAD_BYTES + len(texts) * PER_SCORE_BYTES, f"{len(texts)} scores")
        self._begin(start, texts, now_ms, began)

    def _begin(self, start: Start, texts: list[list[int]], now_ms: int, began: float) -> None:
        queue, embedder = self._ready_queue()
        pooling = start.options.pooling or embedder.pooling
        if embedder.pooled and pooling != embedder.pooling:
            text = f"this model pools by {embedder.pooling!r}, as its file says, and not by {pooling!r}"
            raise TaskRefused(Code.BAD_REQUEST, text)
        deadline_ms = now_ms + start.deadline_ms if start.deadline_ms else NEVER_MS
        queue.add(Job(start.key, texts, pooling, deadline_ms))
        self._starts[start.key] = (start, began)

    def _ready_queue(self) -> tuple[EmbedQueue, Embedder]:
        if self._queue is None or self._embedder is None:
            try:
                self._embedder = self._make_embedder()
            except NoRoom as error:
                # Refused for good: another worker may have room, but each one that is tried refuses work for a while.
                raise TaskRefused(Code.BUSY, str(error)) from error
            embedder = self._embedder
            self._queue = EmbedQueue(
                embedder.context, embedder.sequences, whole=embedder.whole, pooled=embedder.pooled
            )  # fmt: skip
        return self._queue, self._embedder

    def _rows(self, beside_ms: float) -> int:
        assert self._embedder is not None
        most = self._embedder.rows
        if not beside_ms:
            return most
        if not self._row_ms:
            return ROWS_BESIDE
        return max(ROWS_BESIDE // 2, min(most, int(SHARE * beside_ms / self._row_ms)))

    def _embed(self, rows: int) -> list[Output]:
        queue, embedder = self._queue, self._embedder
        assert queue is not None and embedder is not None
        plan = queue.plan(rows)
        if plan is None:
            return []
        began = time.perf_counter()
        found = embedder.embed(plan.tokens, plan.positions, plan.sequences)
        took_ms = (time.perf_counter() - began) * 1000 / len(plan.tokens)
        self._row_ms = took_ms if not self._row_ms else self._row_ms + NEWEST * (took_ms - self._row_ms)
        complete, freed = queue.done(plan, found)
        for sequence in freed:
            embedder.cut(sequence, 0)
        return [self._finish(job) for job in complete]

    def _finish(self, job: Job) -> Output:
        start, began = self._starts.pop(job.key)
        wanted = start.options.normalized
        counts = [len(text) for text in job.texts]
        every = np.stack([vector for vector in job.vectors if vector is not None])
        if not np.isfinite(every).all():
            error = ErrorInfo(
                Code.ENGINE_FAILED, f"the model made no numbers for {start.task}; its file may be damaged"
            )
            return Output(job.key, [], [], "error", _usage(sum(counts), began), error)
        found: TaskResult
        if start.task == "rerank":
            assert self._pair is not None
            found = tasks.RerankResult(self._pair.scores(every[:, 0], raw=start.options.raw), counts)
        else:
            vectors = [normalized(vector) if wanted else vector for vector in every]
            data = np.concatenate(vectors).astype("<f4").tobytes()
            found = tasks.EmbedResult(self._model.embedding_size, job.pooling, wanted, counts, data)
        return _whole(start, found, began, sum(counts))

    def _drop(self, key: bytes) -> None:
        if self._queue is not None and self._embedder is not None:
            for sequence in self._queue.drop(key):
                self._embedder.cut(sequence, 0)


def _whole(start: Start, result: TaskResult, began: float, tokens: int = 0) -> Output:
    pieces = result_pieces(start, result)
    return Output(start.key, [0] * len(pieces), pieces, "stop", _usage(tokens, began))


def _usage(tokens: int, began: float) -> Usage:
    return Usage(prompt_tokens=tokens, prefill_ms=(time.perf_counter() - began) * 1000)
