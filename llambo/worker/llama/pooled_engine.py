"""The engine of a model that embeds texts or reranks documents. It makes no tokens: there are only tasks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.tasks import TASKS_OF, RerankInput
from llambo.mesh.wire.timers import NEVER_MS
from llambo.worker.engine.protocol import ALIVE_MS, Fault, Output, Progress, Ready, Refused, Start
from llambo.worker.llama import llama
from llambo.worker.llama.embedder import Embedder
from llambo.worker.llama.llama_engine import Setup, not_for
from llambo.worker.llama.llama_tasks import Tasks
from llambo.worker.llama.reranking import PairPrompt

#: More than one token, as forbidden instructions are used only then, and it fits the smallest context.
SELF_TEST = "The quick brown fox jumps over the lazy dog."


class PooledEngine:
    """Loads and tests the model when it is created. `send` gets progress meanwhile, `alive` is called in long steps."""

    fault: Fault | None = None

    def __init__(
        self, setup: Setup, send: Callable[[Progress], None] = lambda progress: None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._setup = setup
        self._alive, self._alive_at = alive, time.monotonic()
        self._model = setup.load(send)
        self._pair = PairPrompt(self._model, setup.purpose) if setup.purpose.kind == "rerank" else None
        self._embedder = Embedder(
            self._model, setup.layout, setup.layout.context, setup.purpose, self._show_life
        )  # fmt: skip
        self._tasks = Tasks(
            self._model,
            None,
            context=self._embedder.context,
            make_embedder=lambda: self._embedder,
            info=self._info,
            pair=self._pair,
        )
        send(Progress(f"testing {setup.name}"))
        self._test()

    def ready(self) -> Ready:
        return self._setup.ready(self._model, self._embedder.context)

    def start(self, start: Start, now_ms: int) -> Refused | None:
        if start.task not in TASKS_OF[self._setup.purpose.kind]:
            return Refused(start.key, not_for(self._setup, start.task), final=True)
        if self._tasks.count >= (slots := self._setup.layout.slots):
            return Refused(start.key, ErrorInfo(Code.BUSY, f"all {slots} slots of this engine are taken"))
        return self._tasks.start(start, now_ms)

    def stop(self, key: bytes) -> None:
        self._tasks.stop(key)

    def next_wakeup_ms(self) -> int:
        return 0 if self._tasks.pending else NEVER_MS

    def step(self, now_ms: int) -> list[Output]:
        self._alive_at = time.monotonic()
        return self._tasks.step(now_ms, 0.0)

    def _show_life(self) -> None:
        now = time.monotonic()
        if 1_000 * (now - self._alive_at) >= ALIVE_MS:
            self._alive_at = now
            self._alive()

    def _info(self) -> dict[str, Any]:
        return {**self._setup.facts(self._model, self._embedder.context), "pooling": self._embedder.pooling}

    def _test(self) -> None:
        """If it crashes, or makes no numbers, it is while loading and not in a request."""
        key, task = bytes(limits.RUN_KEY_BYTES), self._setup.purpose.kind
        given: Any = [SELF_TEST] if task == "embed" else RerankInput(SELF_TEST, [SELF_TEST])
        refused = self.start(Start(key, msgspec.msgpack.encode(given), limits.RESULT_PIECES, 0, task=task), 0)
        if refused is not None:
            raise llama.LoadError(f"the self-test was refused: {refused.error.text}")
        while self._tasks.pending:
            for output in self.step(0):
                if output.error is not None:
                    raise llama.LoadError(f"the self-test failed: {output.error.text}")
