"""Reads the history of a run and reports what is wrong with its answers. It does not depend on how the mesh works.

Of each answer: every index once and in order; each token is the one that has to be there; one END, with the right
count, and nothing after it; no dispatch speaks again once another one has spoken (that would be a zombie's token);
two readings of one answer are the same; and every request ends, unless its own client was killed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from llambo.worker.engine.fake_model import START, base_of, pieces_of, plain_base, plain_next, wander_next
from tests.chaos.history import Line

#: What is wrong with an answer, from the counters' point of view.
LOST, DUPLICATED, WRONG, STALE, HUNG, ERROR, END = "lost", "duplicated", "wrong", "stale", "hung", "error", "end"
#: What a request may cost that kills whatever engine runs it.
POISON_DEATHS = 2
SORTS = (LOST, DUPLICATED, WRONG, STALE, HUNG, ERROR, END)

#: What a request for a model that is loaded on demand may get in place of an answer.
REFUSALS = ("engine_failed", "busy", "queue_timeout")

#: A silence within so long after a broker's end is taken to come of it.
AFTER_RESTART_MS = 5_000


@dataclass(frozen=True, slots=True)
class Wrong:
    """One finding. `id` is the request's, if it is about one."""

    sort: str
    text: str
    at_ms: int = 0
    id: str = ""


@dataclass
class Reading:
    """One reader's view of one answer."""

    ids: list[int] = field(default_factory=list)
    #: Dispatches in the order in which their tokens stand in the answer, neighbours put together.
    dispatches: list[str] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    ends: list[Line] = field(default_factory=list)
    errors: list[Line] = field(default_factory=list)
    wrong: list[Wrong] = field(default_factory=list)


@dataclass
class Asked:
    """One request, and what came of it."""

    submit: Line
    readings: dict[int, Reading] = field(default_factory=dict)
    why: Line | None = None

    @property
    def id(self) -> str:
        return str(self.submit["id"])


@dataclass
class Streams:
    """All requests of a run, judged."""

    requests: dict[str, Asked] = field(default_factory=dict)
    wrong: list[Wrong] = field(default_factory=list)
    #: Requests whose client was killed before they ended, so that no END could be delivered.
    orphaned: int = 0
    #: Refused or failed, as they were meant to be.
    foreseen: int = 0
    #: Detached results that a broker lost because it was restarted before the client attached again.
    forgotten: int = 0
    tokens: int = 0
    #: When brokers were restarted.
    restarts: list[int] = field(default_factory=list)
    #: Of each request that was meant to kill engines: how many died while they ran it, by its broker's transcript.
    deaths: list[int] = field(default_factory=list)


def judge(lines: Iterable[Line], *, style: str, split: bool) -> Streams:
    """`style`: plain, wander, or anything else where the truth is not known beforehand."""
    lines = list(lines)
    streams, killed, restarts = _collect(lines)
    streams.restarts = restarts
    poison_alone = {line["kind"] for line in lines if line["e"] == "fault"} == {"poison"}
    for asked in streams.requests.values():
        _judge_one(streams, asked, asked.submit["who"] in killed, style, split)
        if asked.submit.get("fate") == "engine_failed" and asked.why is not None:
            _judge_deaths(streams, asked, asked.why["story"], poison_alone)
        _forgive(streams, asked, restarts)
    streams.wrong.sort(key=lambda wrong: wrong.at_ms)
    return streams


def _collect(lines: Iterable[Line]) -> tuple[Streams, set[str], list[int]]:
    """Also the clients that were killed, and when brokers were restarted."""
    streams, killed, restarts = Streams(), set[str](), list[int]()
    for line in lines:
        match line["e"]:
            case "submit":
                streams.requests[line["id"]] = Asked(line)
            case "chunk" | "end" | "error" | "why":
                asked = streams.requests.get(line.get("id", ""))
                if asked is not None:
                    _note(asked, line)
                elif line["e"] == "error":
                    # It was never admitted, so it has no id; an error it is.
                    streams.wrong.append(Wrong(ERROR, f"{line['code']}: {line['text']}", line["t"]))
                else:
                    streams.wrong.append(Wrong(WRONG, f"{line['e']} for a request that was never submitted", line["t"]))
            case "killed":
                killed.add(line["whom"])
            case "fault" if line["kind"] == "broker":
                restarts.append(line["t"])
    return streams, killed, restarts


def _forgive(streams: Streams, asked: Asked, restarts: list[int]) -> None:
    """A broker stores results in memory only: there is no promise that a result outlives its broker."""
    for wrong in [wrong for wrong in streams.wrong if wrong.id == asked.id and wrong.sort == ERROR]:
        unknown = wrong.text.startswith(("unknown_request", "expired"))
        again = asked.submit.get("how") == "detached" and asked.readings.get(0) and asked.readings[0].ends
        if unknown and again and any(asked.submit["t"] <= at <= wrong.at_ms for at in restarts):
            streams.wrong.remove(wrong)
            streams.forgotten += 1


def _judge_deaths(streams: Streams, asked: Asked, story: list[Line], poison_alone: bool) -> None:
    """A request is refused after two engine deaths. Under other faults, deaths they cause may be counted as well."""
    deaths = sum(step["what"] == "engine died" for step in story)
    streams.deaths.append(deaths)
    if poison_alone and deaths != POISON_DEATHS:
        text = f"{deaths} engines died while they ran it, {POISON_DEATHS} are allowed"
        streams.wrong.append(Wrong(ERROR, text, asked.submit["t"], asked.id))


def _note(asked: Asked, line: Line) -> None:
    if line["e"] == "why":
        asked.why = line
        return
    reading = asked.readings.setdefault(line.get("r", 0), Reading())
    if reading.ends or reading.errors:
        text = f"{line['e']} after its end"
        reading.wrong.append(Wrong(END, text, line["t"], asked.id))
    match line["e"]:
        case "end":
            reading.ends.append(line)
        case "error":
            reading.errors.append(line)
        case _:
            _note_chunk(asked, reading, line)


def _note_chunk(asked: Asked, reading: Reading, line: Line) -> None:
    have, first, ids = len(reading.ids), line["i"], line["ids"]
    if first > have:
        text = f"token {first} came when {have} was next"
        reading.wrong.append(Wrong(LOST, text, line["t"], asked.id))
    elif first < have and ids:
        text = f"token {first} came again when {have} was next"
        reading.wrong.append(Wrong(DUPLICATED, text, line["t"], asked.id))
    made = sum(count for _, count in line["d"])
    if made != len(ids):
        text = f"{len(ids)} tokens from {first} on, of which {made} came in chunks"
        reading.wrong.append(Wrong(WRONG, text, line["t"], asked.id))
    for dispatch, count in line["d"]:
        reading.dispatches += [dispatch] * count
    reading.ids += ids
    reading.times.append(line["t"])


def _judge_one(streams: Streams, asked: Asked, killed: bool, style: str, split: bool) -> None:
    foreseen = asked.submit.get("fate", "")
    if not asked.readings:
        asked.readings[0] = Reading()
    for reading in asked.readings.values():
        streams.tokens += len(reading.ids)
        found = [*reading.wrong, *_tokens(asked, reading, style, split), *_dispatches(asked, reading)]
        found += _ends(streams, asked, reading, killed, foreseen, style)
        streams.wrong += found
    first, *others = asked.readings.values()
    for other in others:
        common = min(len(first.ids), len(other.ids))
        if first.ids[:common] != other.ids[:common]:
            text = "two readings of one answer differ"
            streams.wrong.append(Wrong(WRONG, text, asked.submit["t"], asked.id))


def _tokens(asked: Asked, reading: Reading, style: str, split: bool) -> list[Wrong]:
    """The first token that is not the one that has to be there."""
    submit, prompt = asked.submit, asked.submit["prompt"].encode()
    if reading.wrong or style not in ("plain", "wander"):
        return []
    base, previous = plain_base(submit["seed"], prompt), START
    for index, token in enumerate(reading.ids):
        if style == "wander":
            base = base_of(bytes.fromhex(reading.dispatches[index]), prompt)
            truth = wander_next(base, previous, split)
        else:
            truth = plain_next(base, index, split)
        if token != truth:
            return [Wrong(WRONG, f"token {index} is {token} and should be {truth}", submit["t"], asked.id)]
        previous = token
    return []


def _dispatches(asked: Asked, reading: Reading) -> list[Wrong]:
    """A dispatch that was followed by another one is over; whatever it says later is stale."""
    over: set[str] = set()
    current = ""
    for index, dispatch in enumerate(reading.dispatches):
        if dispatch == current:
            continue
        if dispatch in over:
            text = f"token {index} is by dispatch {dispatch}, which was over"
            return [Wrong(STALE, text, asked.submit["t"], asked.id)]
        over.add(current)
        current = dispatch
    return []


def _ends(streams: Streams, asked: Asked, reading: Reading, killed: bool, foreseen: str, style: str) -> list[Wrong]:
    submit, at = asked.submit, asked.submit["t"]
    for error in reading.errors:
        if foreseen and error["code"] == foreseen:
            streams.foreseen += 1
            return []
        if "model" in submit and error["code"] in REFUSALS:
            return []  # counted by hosts.py
        return [Wrong(ERROR, f"{error['code']}: {error['text']}", error["t"], asked.id)]
    if not reading.ends:
        if killed:
            streams.orphaned += 1
            return []
        return [Wrong(HUNG, f"it has {len(reading.ids)} of {submit['max']} tokens and no end", at, asked.id)]
    end, found = reading.ends[0], []
    if foreseen:
        found.append(Wrong(END, f"it should have ended with {foreseen}", end["t"], asked.id))
    if end["count"] != len(reading.ids):
        sort = LOST if end["count"] > len(reading.ids) else DUPLICATED
        found.append(Wrong(sort, f"{len(reading.ids)} tokens, and {end['count']} in its end", end["t"], asked.id))
    if style in ("plain", "wander"):
        if end["reason"] != "length" or end["count"] != submit["max"]:
            text = f"it ended with {end['reason']} after {end['count']} of {submit['max']} tokens"
            found.append(Wrong(END, text, end["t"], asked.id))
        text = b"".join(pieces_of(reading.ids)).decode("utf-8", "replace")
        if end["crc"] != zlib.crc32(text.encode()):
            found.append(Wrong(WRONG, "its text is not that of its tokens", end["t"], asked.id))
    return found


# --- figures -----------------------------------------------------------------------------------------


def stalls(streams: Streams) -> tuple[list[int], list[int]]:
    """The longest silence in each answer, in ms: of those that moved, and of those that did not."""
    moved: list[int] = []
    still: list[int] = []
    for asked in streams.requests.values():
        reading = asked.readings.get(0)
        if asked.submit.get("how") != "stream" or reading is None or len(reading.times) < 2 or not reading.ends:
            continue
        longest = max(after - before for before, after in zip(reading.times, reading.times[1:], strict=False))
        (moved if reading.ends[0]["moves"] else still).append(longest)
    return moved, still


def silences(streams: Streams) -> list[int]:
    """Of each answer that was under way when a broker was ended: its longest silence in the seconds after that."""
    found: list[int] = []
    for asked in streams.requests.values():
        reading = asked.readings.get(0)
        if asked.submit.get("how") != "stream" or reading is None or not reading.ends:
            continue
        gaps = list(zip(reading.times, reading.times[1:], strict=False))
        for at in streams.restarts:
            near = [after - before for before, after in gaps if after >= at and before <= at + AFTER_RESTART_MS]
            if gaps and gaps[0][0] <= at <= gaps[-1][1]:
                found.append(max(near))
    return found


def shares(streams: Streams) -> dict[str, int]:
    """How many answers each worker has brought to their end."""
    counts: dict[str, int] = {}
    for asked in streams.requests.values():
        for end in [end for reading in asked.readings.values() for end in reading.ends][:1]:
            counts[end["worker"]] = counts.get(end["worker"], 0) + 1
    return dict(sorted(counts.items()))
