"""What goes into the next decoding step: continuous batching. Pure, without a model or a clock.

An engine has slots; each holds one sequence of tokens whose keys and values are in the cache (its cells). A request
takes a free slot, and until its last prompt token has been decoded it prefills; from then on it puts one token into
every step. All requests share each step; the engine decodes its prompts first, and then its streams. Three things are
decided here:

    share     a step with running streams takes only so many prompt tokens that it lasts at most STRETCH times as
              long as one without; a step without streams only so many that cancels and deadlines take effect soon.
              Both follow from measured times, so that they suit a small model as well as a large one. Steps
              without prompts accumulate time for a burst: short prompts that come together are decoded together,
              and before a long one.
    reuse     a finished slot retains its tokens. A new request takes the slot with the longest common prefix, or gets
              a copy of the prefix of another slot, also of a running one. Slots are replaced least recently used first.
    adapters  one decode computes with one adapter, or with none. The tokens of a slot belong to its adapter: only a
              request with the same one can reuse them. `groups` divides a step: every step decodes all groups, so none
              waits for another, and a step has no more groups than there are slots.
    cells     a slot never holds more than `context` tokens: a request that could exceed that is refused.

Every slot has a cache of its own, of `context` cells (one cache for all was measured to be slower). llama.cpp decodes
neighbouring slots together, and others one after the other, so a new request is put beside the running ones.
The engine executes what `plan` returns, and reports to `done` how long it took.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

#: A step with prompt tokens may take this many times as long as a step without.
STRETCH = 2.5
#: A step without running streams takes about this long, so that a cancel takes effect in the middle of a prompt.
PREFILL_STEP_MS = 300.0
#: Beyond that, prompts that fit completely may take up to BURST_MS, which accumulates at the rate SAVED while streams
#: run without prompts. Several short prompts at once are one short pause; divided into small parts, each would wait for
#: all before it.
BURST_MS = 400.0
SAVED = 0.1
#: Prompt tokens in a step, at least: with fewer a prompt would wait too long behind running streams.
MIN_SHARE = 2
#: Assumed until something was measured.
FIRST_SHARE = 32
#: Copying cells of another slot copies the whole slot; a shorter prefix is computed faster.
MIN_COPY = 64
#: Weight of the newest measurement.
NEWEST = 0.25


@dataclass(slots=True)
class Slot:
    """`tokens[:cells]` are in the cache; the rest waits to be decoded."""

    number: int
    tokens: list[int] = field(default_factory=list)
    cells: int = 0
    key: bytes | None = None
    #: None of its prompt is decoded yet.
    fresh: bool = False
    #: When it became free, counted in requests: the smallest is the least recently used.
    used: int = 0
    #: What its cells were computed with; empty: the model alone.
    adapter: str = ""

    @property
    def waiting(self) -> int:
        return len(self.tokens) - self.cells


@dataclass(frozen=True, slots=True)
class Placed:
    """The slot of a request, and what has to be done to the cache before the next step."""

    slot: int
    #: Tokens that need not be computed.
    cached: int
    #: Copy the cells of this slot first, then cut them back to `cached`.
    copy_from: int | None = None


@dataclass(slots=True)
class Plan:
    """One decoding step, as columns."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    #: Row and key of each request that gets a next token from this step.
    outputs: list[tuple[int, bytes]] = field(default_factory=list)
    #: How many of the rows are prompt.
    prefill: int = 0


class Batcher:
    def __init__(self, slots: int, context: int, batch: int) -> None:
        self.context = context
        self.slots = [Slot(number) for number in range(slots)]
        self._batch = batch
        self._by_key: dict[bytes, Slot] = {}
        #: Requests that still prefill, oldest first.
        self._prefilling: dict[bytes, Slot] = {}
        self._finished = 0
        #: A step without prompts, by the number of its streams.
        self._decode_ms: dict[int, float] = {}
        self._prefill_ms = 0.0  # per token
        self._burst_ms = BURST_MS

    @property
    def running(self) -> int:
        return len(self._by_key)

    @property
    def cells(self) -> int:
        """Cells in use by running requests. All others are cache, which may be dropped at any time."""
        return sum(slot.cells for slot in self._by_key.values())

    def place(self, key: bytes, tokens: list[int], adapter: str = "") -> Placed | None:
        """A slot for this request; None: all are taken. At least one token is left to decode, for its output."""
        free = [slot for slot in self.slots if slot.key is None]
        if not free:
            return None
        assert tokens, "a prompt has at least one token"
        assert len(tokens) <= self.context, "a request that could exceed the context should have been refused"
        placed = self._choose(free, tokens, adapter)
        slot = self.slots[placed.slot]
        slot.key, slot.fresh, slot.adapter = key, True, adapter
        slot.tokens, slot.cells = list(tokens), placed.cached
        self._by_key[key] = slot
        self._prefilling[key] = slot
        return placed

    def restart(self, key: bytes) -> None:
        """The cache could not be cut or copied (some models cannot): compute everything."""
        self._by_key[key].cells = 0

    def push(self, key: bytes, token: int) -> None:
        """The next token of a running request: it is decoded in the next step."""
        slot = self._by_key[key]
        assert slot.waiting == 0, "its last token is not decoded yet"
        slot.tokens.append(token)

    def finish(self, key: bytes) -> None:
        """Ended or cancelled, also in the middle of its prompt. Its cells stay in the cache for later requests."""
        slot = self._by_key.pop(key)
        self._prefilling.pop(key, None)
        self._finished += 1
        slot.key, slot.used = None, self._finished
        del slot.tokens[slot.cells :]

    def forget(self) -> list[int]:
        """Drop the cache of finished requests. Returns the slots that are empty now."""
        free = [slot for slot in self.slots if slot.key is None]
        for slot in free:
            slot.tokens.clear()
            slot.cells = 0
        return [slot.number for slot in free]

    def _choose(self, free: list[Slot], tokens: list[int], adapter: str) -> Placed:
        shared = [
            common_prefix(slot.tokens[: slot.cells], tokens[:-1]) if slot.adapter == adapter else 0
            for slot in self.slots
        ]
        own = max(free, key=lambda slot: shared[slot.number])
        apart = self._apart()
        oldest = min(free, key=lambda slot: (apart[slot.number], slot.cells > 0, slot.used))
        donor = max(self.slots, key=lambda slot: shared[slot.number])
        saved = shared[donor.number]
        # In place, unless that would destroy a long prefix of another conversation for a short one of this request.
        if 0 < own.cells <= 2 * shared[own.number] and saved - shared[own.number] < MIN_COPY:
            return Placed(own.number, shared[own.number])
        if donor is not oldest and saved - shared[oldest.number] >= MIN_COPY:
            return Placed(oldest.number, saved, donor.number)
        return Placed(oldest.number, shared[oldest.number])

    def _apart(self) -> list[int]:
        """For each slot: the number of groups of neighbours among the busy slots if it were busy as well."""
        busy = [slot.key is not None for slot in self.slots]
        runs = []
        for number in range(len(busy)):
            with_it = [*busy[:number], True, *busy[number + 1 :]]
            runs.append(sum(here and not before for before, here in pairwise([False, *with_it])))
        return runs

    def plan(self) -> Plan | None:
        """The next step, or None if there is nothing to decode. `done` has to follow."""
        plan = Plan()
        # In the order of the slots, because llama.cpp decodes neighbours together.
        for slot in self.slots:
            if slot.key is not None and slot.key not in self._prefilling and slot.waiting:
                self._add(plan, slot.key, slot, 1)
        share, burst = self._share(len(plan.tokens))
        for key, slot in list(self._prefilling.items()):
            count = min(share - plan.prefill, slot.waiting)
            if slot.fresh and slot.waiting <= share + burst - plan.prefill:
                count = slot.waiting
                burst -= max(0, plan.prefill + count - share)
                share = max(share, plan.prefill + count)
            if count > 0:
                self._add(plan, key, slot, count)
                plan.prefill += count
        return plan if plan.tokens else None

    def groups(self, plan: Plan, first: str = "") -> list[tuple[str, list[int]]]:
        """The rows of the plan that are decoded together, and their adapter: of each adapter its streams and its
        prompts. `first`: the adapter to begin with, since to change it costs time.
        """
        streams = len(plan.tokens) - plan.prefill
        found: dict[tuple[str, bool], list[int]] = {}
        for row, number in enumerate(plan.slots):
            # Prompts have a call of their own: beside a long prompt every stream would read as many cells as it.
            found.setdefault((self.slots[number].adapter, row >= streams), []).append(row)
        order = sorted(found, key=lambda group: (group[0] != first, group[0], not group[1]))
        return [(group[0], found[group]) for group in order]

    def _add(self, plan: Plan, key: bytes, slot: Slot, count: int) -> None:
        start, end = slot.cells, slot.cells + count
        plan.tokens += slot.tokens[start:end]
        plan.positions += range(start, end)
        plan.slots += [slot.number] * count
        if end == len(slot.tokens):
            plan.outputs.append((len(plan.tokens) - 1, key))

    def done(self, plan: Plan, took_ms: float) -> None:
        """The step was decoded in `took_ms`."""
        for number in plan.slots:
            self.slots[number].cells += 1
            self.slots[number].fresh = False
        for _, key in plan.outputs:
            self._prefilling.pop(key, None)
        streams = len(plan.tokens) - plan.prefill
        if not plan.prefill:
            self._decode_ms[streams] = _mixed(self._decode_ms.get(streams, 0.0), took_ms)
            self._burst_ms = min(BURST_MS, self._burst_ms + SAVED * took_ms)
            return
        decode_ms = self._undisturbed_ms(streams)
        if plan.prefill >= MIN_SHARE:
            rest_ms = max(took_ms - decode_ms, 0.1 * took_ms)
            self._prefill_ms = _mixed(self._prefill_ms, rest_ms / plan.prefill)
        if streams:
            self._burst_ms -= max(0.0, took_ms - STRETCH * decode_ms)

    def _undisturbed_ms(self, streams: int) -> float:
        """What a step of so many streams takes without prompts.

        Until it is measured it is estimated from the nearest number that was: half of such a step is the same for
        any number (the weights have to be read), half grows with it. With an estimate far too low, prompts would seem
        slow, and would then get a few tokens of each step only.
        """
        if not streams or not self._decode_ms:
            return 0.0
        known = min(self._decode_ms, key=lambda number: abs(number - streams))
        return self._decode_ms[known] * (1 + streams / known) / 2

    def _share(self, streams: int) -> tuple[int, int]:
        """Prompt tokens for a step with so many running streams, and how many more for prompts that fit in whole."""
        room = self._batch - streams
        if not self._prefill_ms:
            return min(room, FIRST_SHARE), 0
        spare_ms = (STRETCH - 1) * self._undisturbed_ms(streams) if streams else PREFILL_STEP_MS
        share = min(room, max(MIN_SHARE, int(spare_ms / self._prefill_ms)))
        burst = int(max(0.0, self._burst_ms) / self._prefill_ms) if streams else 0
        return share, min(burst, room - share)


def _mixed(old: float, new: float) -> float:
    return new if not old else old + NEWEST * (new - old)


def common_prefix(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with. By halves, because comparing slices is what Python does fast."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
