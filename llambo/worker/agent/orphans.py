"""Runs whose broker is gone: they go on, and are offered to other brokers.

A broker that dies loses all it knew. Its worker knows the run too: the request, the prompt, each token so far. So a run
that has lost its link is offered to every other broker at once, and to each one that welcomes this worker later. It
belongs to the first that adopts it: its tokens are published there from then on, and those made in the meantime are
fetched by replay. A run that no broker adopts within `orphan_ms` is stopped.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from llambo.mesh.link.link_core import LinkCore
from llambo.mesh.wire import limits, transfer
from llambo.mesh.wire import messages as m
from llambo.worker.agent.actions import Action, Log, StopRun
from llambo.worker.agent.delivery import Delivery
from llambo.worker.agent.engine_life import NEVER_MS
from llambo.worker.agent.runs import Run


class Orphans:
    """`links`, `delivery` and `out` belong to the core."""

    def __init__(self, links: Mapping[int, LinkCore], delivery: Delivery, out: list[Action], orphan_ms: int) -> None:
        self._links = links
        self._delivery = delivery
        self._out = out
        self._orphan_ms = orphan_ms
        #: When the first of them has to be stopped.
        self._due_at = NEVER_MS

    def on_link_lost(self, number: int, now_ms: int) -> None:
        lost = []
        for run in self._delivery.runs.of_link(number):
            if run.end is not None and run.end.reason == "cancelled":
                # Its client knows that already. To another broker it would look like an answer that was cut short.
                self._delivery.runs.drop(run)
                continue
            lost.append(run)
            run.orphan_at = now_ms + self._orphan_ms
            self._out.append(Log(f"a request has lost its broker at {run.tokens.end} tokens", request=run.id))
            self._due_at = min(self._due_at, run.orphan_at)
        if lost:
            self._out.append(Log(f"{len(lost)} runs have lost their broker; they go on for {self._orphan_ms} ms"))
        for other, link in self._links.items():
            if other != number and link.welcomed:
                self._offer(lost, other, now_ms)

    def on_welcome(self, number: int, now_ms: int) -> None:
        self._offer(self._delivery.runs.orphans(), number, now_ms)

    def adopt(self, number: int, adopt: m.Adopt, now_ms: int) -> None:
        """If another broker was faster, or the run was stopped, the broker learns it from the next beat's claims."""
        run = self._delivery.runs.get(adopt.id + adopt.dispatch)
        if run is None or not run.orphan_at:
            return
        run.link, run.orphan_at = number, 0
        if run.end is not None:
            self._delivery.send_end(run, run.end, now_ms)

    def tick(self, now_ms: int) -> None:
        if now_ms < self._due_at:
            return
        self._due_at = NEVER_MS
        for run in self._delivery.runs.orphans():
            if now_ms >= run.orphan_at:
                self._drop(run)
            else:
                self._due_at = min(self._due_at, run.orphan_at)

    def next_wakeup_ms(self) -> int:
        return self._due_at

    def _offer(self, runs: list[Run], number: int, now_ms: int) -> None:
        for run in runs:
            if run.tokens.base:
                continue  # the text before `base` is unknown here, so the answer cannot be completed from this run
            chunks, after = run.chunks(0, run.tokens.end, limits.CONTROL_FRAME_BYTES - len(run.prompt))
            if after < run.tokens.end:
                continue  # too large for one frame
            blob, prompt_bytes = transfer.pack(run.prompt, chunks)
            left = max(1, run.deadline_at - now_ms) if run.deadline_at else 0
            work = msgspec.structs.replace(run.dispatched, prefix=[], prompt_bytes=prompt_bytes, deadline_ms=left)
            self._links[number].send(m.Orphan(work, run.link == number), blob)

    def _drop(self, run: Run) -> None:
        self._out.append(Log("a request is dropped: no broker has adopted it", warning=True, request=run.id))
        if run.end is None:
            self._out.append(StopRun(run.key))
        self._delivery.runs.drop(run)
