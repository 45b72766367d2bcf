"""An engine without a model: its tokens are hashes, its pace and its faults are options.

It proves what a model cannot: see `fake_model`. It is a core: `step(now_ms)` returns the outputs that are due,
`next_wakeup_ms` is when to call it again, and after each step `fault` is set if the process has to crash or hang
now. The engine child does that, the simulator imitates it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.messages import ModelInfo, Reason, Usage
from llambo.mesh.wire.naming import FAKE, adapter_fingerprint, with_adapter
from llambo.mesh.wire.tasks import TASKS_OF
from llambo.mesh.wire.timers import NEVER_MS
from llambo.worker.config import FakeOptions
from llambo.worker.engine import fake_model
from llambo.worker.engine.fake_model import START, piece_of, pieces_of
from llambo.worker.engine.protocol import (
    ALIVE_MS,
    Fault,
    NoSuchAdapter,
    Output,
    Ready,
    Refused,
    Start,
    TaskRefused,
    adapter_of,
)

#: An unpaced engine takes this long per token once `slow_factor` has something to multiply.
UNPACED_MS = 1.0
#: A poisonous prompt kills the engine before it makes the token with this index.
POISON_INDEX = 5
#: A delayed engine catches up with its pace by at most this much.
CATCH_UP_MS = 1000.0


@dataclass(slots=True)
class _Sequence:
    """One request. `base` is what its hashes have in common; `index` and `previous` are where it is."""

    start: Start
    base: int
    index: int
    previous: int
    limit: int
    #: The reason of the END if it reaches `limit`.
    reason: Reason
    prompt_tokens: int
    started_ms: int
    due_ms: float
    deadline_ms: int
    stops: list[bytes]
    #: For a task: the pieces of its result.
    result: list[bytes] | None = None
    poisonous: bool = False
    #: The end of the text so far, as long as the longest stop string.
    tail: bytes = b""
    first_ms: int = -1


class FakeEngine:
    """Times are whole milliseconds of any clock."""

    def __init__(self, options: FakeOptions, model: str = "fake", memory: bytes = b"") -> None:
        """`memory`: what a model of its size takes, for tests."""
        self.fault: Fault | None = None
        #: The key of the poisonous sequence that has killed it.
        self.poisoned = b""
        self.tokens = 0
        self._options = options
        self._model = model
        self._memory = memory
        self._wander = options.style == "wander"
        self._sequences: dict[bytes, _Sequence] = {}
        self._alive_at = 0

    def ready(self) -> Ready:
        # Two fake engines can continue each other's answers only if they would produce the same tokens.
        options = self._options
        fingerprint = f"{FAKE}-{options.style}-{options.answer_tokens}-{int(options.utf8_split)}"
        info = ModelInfo(self._model, fingerprint, options.context_tokens, options.kind)
        with_adapters = [
            msgspec.structs.replace(
                info,
                name=with_adapter(self._model, adapter.name),
                fingerprint=adapter_fingerprint(fingerprint, fake_model.adapter_digest(adapter.path)),
            )
            for adapter in options.adapters
        ]
        return Ready([info, *with_adapters], options.slots, "fake engine")

    @property
    def running_keys(self) -> list[bytes]:
        return list(self._sequences)

    def start(self, start: Start, now_ms: int) -> Refused | None:
        refusal = self._refusal(start)
        if refusal is not None:
            return refusal
        sequence = self._sequence(start, now_ms)
        if start.task != "generate":
            try:
                sequence.result = fake_model.result_of(start, self._options, self._model)
            except TaskRefused as error:
                return Refused(start.key, error.info, final=True)
            sequence.limit, sequence.reason = len(sequence.result), "stop"
        if not self._sequences:
            self._alive_at = now_ms + ALIVE_MS
        self._sequences[start.key] = sequence
        return None

    def stop(self, key: bytes) -> None:
        self._sequences.pop(key, None)

    def next_wakeup_ms(self) -> int:
        if self.fault or not self._sequences:
            return NEVER_MS
        due = min([sequence.due_ms for sequence in self._sequences.values()])
        return min(math.ceil(due), self._alive_at)

    def step(self, now_ms: int) -> list[Output]:
        """At most one output for each sequence that is due. An empty list still shows that the engine is alive."""
        self._alive_at = now_ms + ALIVE_MS
        outputs = []
        for sequence in list(self._sequences.values()):
            if self.fault:
                break
            if sequence.due_ms <= now_ms:
                if sequence.poisonous and sequence.index >= POISON_INDEX:
                    # As in a real decode, the whole batch is lost: no sequence gets an output from this step.
                    self.fault, self.poisoned = "crash", sequence.start.key
                    return []
                outputs.append(self._advance(sequence, now_ms))
        return outputs

    def _refusal(self, start: Start) -> Refused | None:
        if len(self._sequences) >= self._options.slots:
            return Refused(start.key, ErrorInfo(Code.BUSY, f"all {self._options.slots} slots of this engine are taken"))
        if start.task not in TASKS_OF[self._options.kind]:
            text = f"{self._model} is a fake model of the kind {self._options.kind!r}, which does not do {start.task!r}"
            return Refused(start.key, ErrorInfo(Code.BAD_REQUEST, text), final=True)
        try:
            adapter_of(start.model, self._model, self._options.adapters)
        except NoSuchAdapter as error:
            return Refused(start.key, error.info)
        prompt_tokens, limit = len(start.prompt.split()), self._options.context_tokens
        if start.task == "generate" and limit and prompt_tokens + start.max_tokens > limit:
            text = f"{prompt_tokens} prompt tokens + max_tokens {start.max_tokens} exceed the context of {limit}"
            return Refused(start.key, ErrorInfo(Code.TOO_LONG, text), final=True)
        return None

    def _sequence(self, start: Start, now_ms: int) -> _Sequence:
        mean, limit = self._options.answer_tokens, start.max_tokens
        natural = fake_model.answer_length(start.seed, start.prompt, mean) if mean else limit + 1
        stops = [text.encode() for text in start.sampling.stop]
        sequence = _Sequence(
            start=start,
            base=self._base(start),
            index=len(start.prefix),
            previous=start.prefix[-1] if start.prefix else START,
            limit=min(limit, natural),
            reason="stop" if natural <= limit else "length",
            prompt_tokens=len(start.prompt.split()),
            started_ms=now_ms,
            due_ms=now_ms + self._options.ttft_ms,
            deadline_ms=now_ms + start.deadline_ms if start.deadline_ms else NEVER_MS,
            stops=stops,
            poisonous=bool(self._options.faults.poison) and self._options.faults.poison.encode() in start.prompt,
        )
        if stops:
            reach = max(map(len, stops))
            sequence.tail = b"".join(pieces_of(start.prefix[-reach:]))[-reach:]
        sequence.due_ms += self._jitter(sequence)
        return sequence

    def _base(self, start: Start) -> int:
        prompt = start.prompt
        if (adapter := adapter_of(start.model, self._model, self._options.adapters)) is not None:
            prompt = fake_model.adapted(prompt, adapter.path)
        if self._wander:
            return fake_model.base_of(start.key[-limits.DISPATCH_ID_BYTES :], prompt)
        return fake_model.plain_base(start.seed, prompt)

    def _advance(self, sequence: _Sequence, now_ms: int) -> Output:
        if sequence.first_ms < 0:
            sequence.first_ms = now_ms
        end: Reason | None = None
        stop = b""
        first = sequence.index
        if now_ms >= sequence.deadline_ms:
            ids, end = [], "deadline"
        else:
            ids = self._generate(sequence, self._chunk_tokens(sequence))
            if sequence.stops:
                ids, stop = _cut_at_stop(sequence, ids)
                end = "stop" if stop else None
            sequence.index += len(ids)
            if end is None and sequence.index >= sequence.limit:
                end = sequence.reason
        pieces = pieces_of(ids) if sequence.result is None else sequence.result[first : sequence.index]
        self._count(len(ids))
        sequence.due_ms = self._next_due(sequence, len(ids), now_ms)
        key, logprobs = sequence.start.key, None
        if (top := sequence.start.logprobs) is not None:
            logprobs = [fake_model.logprob_of(token, at, top) for at, token in enumerate(ids, first)]
        if end is None:
            return Output(key, ids, pieces, logprobs=logprobs)
        del self._sequences[key]
        usage = Usage(
            prompt_tokens=sequence.prompt_tokens,
            prefill_ms=float(sequence.first_ms - sequence.started_ms),
            decode_ms=float(now_ms - sequence.first_ms),
        )
        return Output(key, ids, pieces, end, usage, logprobs=logprobs, stop=stop.decode())

    def _chunk_tokens(self, sequence: _Sequence) -> int:
        burst = self._options.burst
        wanted = 1 if burst == 1 else 1 + fake_model.decide(sequence.base, sequence.index, burst)
        limit = sequence.limit
        if sequence.poisonous:
            limit = min(limit, max(POISON_INDEX, sequence.index))
        return max(0, min(wanted, limit - sequence.index))

    def _generate(self, sequence: _Sequence, count: int) -> list[int]:
        if sequence.result is not None:
            return [0] * count
        base, index, split = sequence.base, sequence.index, self._options.utf8_split
        if not self._wander:
            return [fake_model.plain_next(base, i, split) for i in range(index, index + count)]
        ids, previous = [], sequence.previous
        for _ in range(count):
            previous = fake_model.wander_next(base, previous, split)
            ids.append(previous)
        sequence.previous = previous
        return ids

    def _count(self, tokens: int) -> None:
        self.tokens += tokens
        faults = self._options.faults
        if faults.crash_at and self.tokens >= faults.crash_at:
            self.fault = "crash"
        elif faults.hang_at and self.tokens >= faults.hang_at:
            self.fault = "hang"

    def _next_due(self, sequence: _Sequence, tokens: int, now_ms: int) -> float:
        """Counted from when this chunk was due, not from when it was made, so that a late step is caught up."""
        pace, faults = self._options.tokens_per_s, self._options.faults
        pause = tokens * 1000 / pace if pace else 0.0
        if faults.slow_at and self.tokens >= faults.slow_at:
            pause = (pause or tokens * UNPACED_MS) * faults.slow_factor
        return max(sequence.due_ms + pause + self._jitter(sequence), now_ms - CATCH_UP_MS)

    def _jitter(self, sequence: _Sequence) -> int:
        most = self._options.jitter_ms
        return fake_model.decide(sequence.base ^ 1, sequence.index, most + 1) if most else 0


def _cut_at_stop(sequence: _Sequence, ids: list[int]) -> tuple[list[int], bytes]:
    """The tokens before a stop string, and that stop string or nothing.

    The token that completes a stop string is not part of the answer. Earlier parts of the string may have been sent.
    """
    reach = max(map(len, sequence.stops))
    for count, token_id in enumerate(ids):
        text = sequence.tail + piece_of(token_id)
        found = [(at, stop) for stop in sequence.stops if (at := text.find(stop)) >= 0]
        if found:
            return ids[:count], min(found, key=lambda each: each[0])[1]
        sequence.tail = text[-reach:]
    return ids, b""
