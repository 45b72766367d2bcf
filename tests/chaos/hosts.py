"""Hosts, which load models on demand: their memory as seen from outside, and what a run with models found.

A fake model takes the memory that it says, as one block of its engine process. The resident part of those blocks is
summed up for each host, several times a second, and held against the budget.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llambo import Client
from tests.chaos import nodes
from tests.chaos.checker import Streams, Wrong
from tests.chaos.history import Journal, Line

MIB = 2**20
#: How often memory is looked at, and the smallest block that belongs to a model: an interpreter has no such blocks.
LOOK_S, BLOCK_BYTES = 0.2, 16 * MIB
#: What a machine that is full of processes may add to the time of a waiter.
SLACK_MS = 5_000
#: Names of models, the one that is asked for most first.
NAMES = "abcdefghij"
OVER, OVERDUE, PLACE = "over budget", "overdue", "wrong model"
_BLOCK = re.compile(rb"^Size: +(\d+) kB.*?^Rss: +(\d+) kB", re.MULTILINE | re.DOTALL)


def specs(mib: Iterable[int], load_ms: int) -> dict[str, str]:
    """Model to what `--models` says of it. A model of twice the size takes twice the time to load."""
    return {name: f"{name}:{size}:{size * load_ms // 40}ms" for name, size in zip(NAMES, mib, strict=True)}


def chances(count: int) -> dict[str, float]:
    """How often each model is asked for: the second half as often as the first, the third a third, and so on."""
    return {name: 1 / (rank + 1) for rank, name in enumerate(NAMES[:count])}


def blocks_bytes(pid: int) -> int:
    """The resident bytes of the blocks of this process that are as large as a model; 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps").read_bytes()
    except OSError:
        return 0
    return sum(int(rss) * 1024 for size, rss in _BLOCK.findall(text) if int(size) * 1024 >= BLOCK_BYTES)


class Memory:
    """Watches the engines of hosts, also those that have outlived their host."""

    def __init__(self, hosts: list[nodes.Node], journal: Journal) -> None:
        self._hosts = hosts
        self._journal = journal
        #: Engine to its host and the time at which it began.
        self.engines: dict[int, tuple[str, int]] = {}
        self._most: dict[str, int] = {}
        self._samples = 0

    async def watch(self) -> None:
        while True:
            await asyncio.to_thread(self.look)
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        for host in self._hosts:
            for pid in host.engines():
                self.engines.setdefault(pid, (host.name, nodes.began(pid)))
        self.engines = {pid: known for pid, known in self.engines.items() if nodes.began(pid) == known[1]}
        sizes = {pid: blocks_bytes(pid) for pid in self.engines}
        # One that has ended meanwhile has not taken its memory at the same time as one that was read after it.
        sizes = {pid: size for pid, size in sizes.items() if nodes.began(pid) == self.engines[pid][1]}
        self._samples += 1
        totals: dict[str, int] = defaultdict(int)
        for pid, size in sizes.items():
            totals[self.engines[pid][0]] += size
        for name, total in totals.items():
            if total > self._most.get(name, 0):
                self._most[name] = total
                self._journal.write("memory", whom=name, bytes=total, engines=len(sizes))

    async def left_over(self, client: Client) -> list[str]:
        """What is held, wished for or on its way at this broker, or not as the host's processes are."""
        found, loaded = list[str](), dict[str, int]()
        for model in await client.models():
            for there in model.hosts:
                loaded[there.host] = loaded.get(there.host, 0) + (there.state == "ready")
                if there.held or there.state in ("loading", "unloading"):
                    found.append(f"{model.model} on {there.host} is {there.state} and held by {there.holders}")
        for host in await client.hosts():
            if host.load or host.evict:
                found.append(f"{host.load} are to be loaded on {host.host}, and {host.evict} unloaded")
        for node in self._hosts:
            engines = len(node.engines())
            if engines != loaded.get(node.name, 0):
                found.append(f"{node.name} has {engines} engines and {loaded.get(node.name, 0)} loaded models")
        return found

    def end(self) -> None:
        self._journal.write("memory samples", count=self._samples)


@dataclass
class Found:
    """By what a request waited for: ms from the request to its first token."""

    first: dict[str, list[int]] = field(default_factory=lambda: {"warm": [], "cold": [], "evict": []})
    refused: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    most: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    wrong: list[Wrong] = field(default_factory=list)


def judge(lines: list[Line], streams: Streams, budget: int, queue_ms: int) -> Found:
    found, stories = Found(), dict[str, list[str]]()
    for line in lines:
        match line["e"]:
            case "waited":
                stories[line["id"]] = line["for"]
            case "memory":
                found.most[line["whom"]] = max(line["bytes"], found.most.get(line["whom"], 0))
                if line["bytes"] > budget:
                    text = f"{line['whom']}: {line['bytes'] // MIB} MiB of {budget // MIB} MiB are resident"
                    found.wrong.append(Wrong(OVER, text, line["t"]))
            case "memory samples":
                found.samples = line["count"]
    if not found.samples or not found.most:
        found.wrong.append(Wrong(OVER, "no memory was seen", 0))
    for asked in streams.requests.values():
        reading = asked.readings.get(0)
        if asked.submit.get("model") is not None and reading is not None:
            _judge_one(found, asked.submit, reading.times, reading.ends, reading.errors, stories, queue_ms)
    return found


def _judge_one(
    found: Found, submit: Line, times: list[int], ends: list[Line], errors: list[Line],
    stories: dict[str, list[str]], queue_ms: int,
) -> None:  # fmt: skip
    id, begun = str(submit["id"]), submit["t"]
    for end in ends:
        if not end["worker"].endswith(f"-{submit['model']}"):
            text = f"{submit['model']} was asked for, and {end['worker']} has answered"
            found.wrong.append(Wrong(PLACE, text, end["t"], id))
    for error in errors:
        found.refused[error["code"]] += 1
        if not (error["text"] and error["t"] - begun <= queue_ms + SLACK_MS):
            found.wrong.append(Wrong(OVERDUE, f"{error} after {error['t'] - begun} ms", error["t"], id))
    if not times:
        return
    if times[0] - begun > queue_ms + SLACK_MS:
        found.wrong.append(Wrong(OVERDUE, f"its first token came after {times[0] - begun} ms", times[0], id))
    if id in stories:
        found.first[_sort_of(stories[id])].append(times[0] - begun)


def _sort_of(waited: list[str]) -> str:
    if any("unloaded" in text or "for memory" in text for text in waited):
        return "evict"
    return "cold" if any("load" in text for text in waited) else "warm"


def totals(found: Found) -> dict[str, Any]:
    if not found.samples:
        return {}
    return {
        **{f"ms first token, {sort}": values for sort, values in found.first.items()},
        **{f"refused {code}": count for code, count in found.refused.items()},
        **{f"resident {host}": most // MIB for host, most in sorted(found.most.items())},
        "resident samples": found.samples,
    }
