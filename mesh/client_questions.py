"""Queries of a client: sent again every second until the answer is whole. Asking twice harms nobody."""

from __future__ import annotations

from collections.abc import Callable

from llambo.mesh import messages as m
from llambo.mesh.client_requests import Question
from llambo.mesh.timers import Timers

#: A query without an answer is asked again after this.
ASK_AGAIN_MS = 1_000


class Questions:
    def __init__(self, send: Callable[[m.Message], None]) -> None:
        self._send = send
        self._open: dict[int, Question] = {}
        self._timers: Timers[int] = Timers()

    def __len__(self) -> int:
        return len(self._open)

    def ask(self, message: m.Query | m.DrainWorker | m.Lease, welcomed: bool, now_ms: int) -> None:
        self._open[message.query] = Question(message)
        if welcomed:
            self._say(message.query, now_ms)

    def on_result(self, result: m.Result) -> bytes | None:
        """The whole answer, once it is here."""
        question = self._open.get(result.query)
        data = None if question is None else question.add(result)
        if data is not None:
            self.forget(result.query)
        return data

    def forget(self, query: int) -> bool:
        self._timers.clear(query)
        return self._open.pop(query, None) is not None

    def give_up(self) -> list[int]:
        queries = list(self._open)
        self._open.clear()
        self.on_lost()
        return queries

    def on_lost(self) -> None:
        self._timers = Timers()

    def say_all(self, now_ms: int) -> None:
        for query in self._open:
            self._say(query, now_ms)

    def on_time(self, now_ms: int) -> None:
        for query in self._timers.due(now_ms):
            self._say(query, now_ms)

    def next_ms(self) -> int:
        return self._timers.next_ms()

    def _say(self, query: int, now_ms: int) -> None:
        self._send(self._open[query].message)
        self._timers.set(query, now_ms + ASK_AGAIN_MS)
