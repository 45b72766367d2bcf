"""The fetch core: which chunk of one file is asked of which host next. Pure; one for each file.

Chunks are written in their order, so a part of a file is always its beginning: its journal can be read again after a
kill, the rest can come from the source of the model by a range, and other hosts can fetch what is there already. Chunks
that arrive early wait in memory, at most `WINDOW` of them.

    sums      Each host states the sha256 of each chunk that it has. Of hosts that differ, the one that the broker named
              first counts; a host whose statement is another one is not asked for that chunk.
    credits   A host is asked for so many chunks at a time, and for one if it is much slower than another.
    slow      What takes another host twice as long as this one needs is asked of this one too.
    liars     A host whose bytes are not what it has stated is asked for nothing more of this file. If the whole file is
              wrong, it begins anew without those that state just that file. If its chunks are those of several, without
              all of these but the first one, whose statements will then count.

The bytes stay in the shell, which computes the sha256 of what has arrived; a chunk is kept only if this is the one
that counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

#: Chunks that one host is asked for at a time.
CREDITS = 3
#: Chunks from the first one that is missing on, which may be asked for.
WINDOW = 16
#: What a host needs for a chunk, as long as it is not known; and the least time after which a second one is asked.
USUAL_MS, STEAL_MS = 1_000, 100
#: A host that needs so many times as long as the fastest one is slow.
SLOW = 4
#: How many hosts may be asked for the same chunk.
ASKED_TWICE = 2
#: An answer that takes so long is not waited for: it may have been lost.
LOST_MS = 10_000
#: How often a host that has no more yet is asked for checksums.
SUMS_MS = 200
#: A file is stuck when no host has had more of it for so long.
STUCK_MS = 3_000


class AskForSums(msgspec.Struct, frozen=True):
    host: str
    first: int


class AskForChunk(msgspec.Struct, frozen=True):
    host: str
    number: int


class WriteChunk(msgspec.Struct, frozen=True):
    """The next one; its bytes have arrived before."""

    number: int


class DropHost(msgspec.Struct, frozen=True):
    """It is asked for nothing more of this file."""

    host: str
    why: str


FetchAction = AskForSums | AskForChunk | WriteChunk | DropHost


@dataclass(slots=True)
class _Source:
    sums: list[bytes] = field(default_factory=list)
    #: When checksums were asked for last, and whether that is answered.
    sums_at: int | None = None
    answered: bool = False
    #: The chunks that it was asked for, and when.
    asked: dict[int, int] = field(default_factory=dict)
    #: How long its last chunks took, on average; 0: none has come.
    took_ms: float = 0.0


class FetchCore:
    def __init__(self, chunks: int, now_ms: int, written: int = 0, dropped: Iterable[str] = ()) -> None:
        """`written`: chunks that are there. `dropped`: hosts whose statements were wrong before."""
        self.chunks = chunks
        self.written = written
        self.sources: dict[str, _Source] = {}
        self.dropped = set(dropped)
        #: Those whose statements have counted.
        self.vouchers: set[str] = set()
        #: Of the chunks that this core has written.
        self._sums: dict[int, bytes] = {}
        #: Chunks that have arrived and are not written, and the sha256 of each.
        self.early: dict[int, bytes] = {}
        #: When another host had the chunk that is missing next.
        self._hope_at = now_ms
        self._out: list[FetchAction] = []

    @property
    def done(self) -> bool:
        return self.written == self.chunks

    def is_stuck(self, now_ms: int) -> bool:
        """No host has had more than this one for a while: there is none, or they have sent wrong bytes."""
        return not self.done and now_ms - self._hope_at >= STUCK_MS

    def go_on_from(self, before: FetchCore) -> None:
        """It has written some of this file, and then others have."""
        self.vouchers |= before.vouchers
        self._sums |= before._sums

    # --- what has happened; each returns what is to be done ---

    def on_hosts(self, names: Iterable[str], now_ms: int) -> list[FetchAction]:
        """Those that may be asked, in the order in which their statements count."""
        before = self.sources
        self.sources = {name: before.get(name) or _Source() for name in names if name not in self.dropped}
        return self._settle(now_ms)

    def on_sums(self, host: str, first: int, sums: list[bytes], now_ms: int) -> list[FetchAction]:
        source = self.sources.get(host)
        if source is not None:
            source.answered = True
            if first == len(source.sums):
                source.sums += sums[: self.chunks - first]
        return self._settle(now_ms)

    def on_chunk(self, host: str, number: int, sum: bytes, now_ms: int) -> tuple[bool, list[FetchAction]]:
        """`sum`: the sha256 of what has arrived. Returns whether the shell is to keep it."""
        source = self.sources.get(host)
        if source is None or number >= len(source.sums):
            return False, self._settle(now_ms)
        asked_at = source.asked.pop(number, None)
        if asked_at is not None:
            took_ms = max(1, now_ms - asked_at)
            source.took_ms = (source.took_ms + took_ms) / 2 if source.took_ms else took_ms
        if sum != source.sums[number]:
            self._drop(host, f"chunk {number} is not what it has stated")
            return False, self._settle(now_ms)
        keep = sum == self._expected(number) and number in self._window() and number not in self.early
        if keep:
            self.early[number] = sum
        return keep, self._settle(now_ms)

    def on_refused(self, host: str, now_ms: int) -> list[FetchAction]:
        """It has no grant for this host yet, or the file no more. It is asked again later."""
        source = self.sources.get(host)
        if source is not None:
            source.sums.clear()
            source.asked.clear()
            source.sums_at, source.answered = now_ms, True
        return self._settle(now_ms)

    def on_time(self, now_ms: int) -> list[FetchAction]:
        return self._settle(now_ms)

    def on_wrong_file(self) -> None:
        """The whole file has another sha256: none of its chunks counts."""
        liars = {name for name, each in self.sources.items() if self._states_all(each)}
        self.dropped |= liars or self.vouchers.difference([*self.sources][:1])
        self.written, self.early, self.vouchers, self._sums = 0, {}, set(), {}
        for host in self.dropped & self.sources.keys():
            del self.sources[host]

    def _states_all(self, source: _Source) -> bool:
        return all(source.sums[number : number + 1] == [sum] for number, sum in self._sums.items())

    # --- what is to be done ---

    def _drop(self, host: str, why: str) -> None:
        self.dropped.add(host)
        del self.sources[host]
        self._out.append(DropHost(host, why))

    def _expected(self, number: int) -> bytes | None:
        """The sha256 that this chunk has to have; None: it is not known."""
        return next((each.sums[number] for each in self.sources.values() if number < len(each.sums)), None)

    def _settle(self, now_ms: int) -> list[FetchAction]:
        while self.written in self.early:
            self._vouch(self.written, self.early.pop(self.written))
            self._out.append(WriteChunk(self.written))
            self.written += 1
        for name, source in self.sources.items():
            for number in [number for number, at in source.asked.items() if now_ms - at >= LOST_MS]:
                del source.asked[number]
                source.took_ms = max(source.took_ms, LOST_MS)
            if self.written < len(source.sums):
                self._hope_at = now_ms
            self._ask_for_sums(name, source, now_ms)
        # One for each in turn, so that the first does not get them all.
        asking = [] if self.done else list(self.sources.items())
        while asking:
            asking = [each for each in asking if self._ask(*each, now_ms)]
        actions, self._out = self._out, []
        return actions

    def _window(self) -> range:
        return range(self.written, min(self.written + WINDOW, self.chunks))

    def _vouch(self, number: int, sum: bytes) -> None:
        self._sums[number] = sum
        self.vouchers |= {name for name, each in self.sources.items() if each.sums[number : number + 1] == [sum]}

    def _ask_for_sums(self, name: str, source: _Source, now_ms: int) -> None:
        if len(source.sums) >= min(self.chunks, self.written + 2 * WINDOW):
            return
        pause_ms = SUMS_MS if source.answered else LOST_MS
        if source.sums_at is None or now_ms - source.sums_at >= pause_ms:
            source.sums_at, source.answered = now_ms, False
            self._out.append(AskForSums(name, len(source.sums)))

    def _ask(self, name: str, source: _Source, now_ms: int) -> bool:
        best_ms = min((each.took_ms for each in self.sources.values() if each.took_ms), default=0.0)
        if len(source.asked) >= (1 if source.took_ms > SLOW * best_ms > 0 else CREDITS):
            return False
        number = self._choose(source, now_ms)
        if number is None:
            return False
        source.asked[number] = now_ms
        self._out.append(AskForChunk(name, number))
        return True

    def _choose(self, source: _Source, now_ms: int) -> int | None:
        """The first that was asked of no other host; or else the first that another one takes too long for."""
        late, late_ms = None, max(STEAL_MS, 2 * (source.took_ms or USUAL_MS))
        for number in self._window():
            if number >= len(source.sums):
                break
            wanted = self._expected(number)
            if number in self.early or number in source.asked or wanted != source.sums[number]:
                continue
            able = [each for each in self.sources.values() if each.sums[number : number + 1] == [wanted]]
            since = [each.asked[number] for each in able if number in each.asked]
            if not since:
                return number
            if late is None and len(since) < ASKED_TWICE and now_ms - max(since) >= late_ms:
                late = number
        return late
