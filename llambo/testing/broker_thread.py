"""The broker in a thread of the test, so that a test can look at the state of its core, and wait for a change of it."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from llambo.broker import invariants
from llambo.broker.config import BrokerConfig
from llambo.broker.core import BrokerCore
from llambo.broker.report import queries
from llambo.broker.server import BrokerServer

T = TypeVar("T")
#: How long the thread may take to answer or to end.
ANSWER_S = 30.0
#: Events and stories of requests that are printed.
PRINTED = 40


class WatchedBroker(BrokerServer):
    """After each turn it asks the watches, in the thread of the broker."""

    def __init__(self, config: BrokerConfig, host: str, port: int, *, check: bool, **options: Any) -> None:
        super().__init__(config, host, port, **options)
        self._lock = threading.Lock()
        self._watches: list[Callable[[BrokerCore], bool]] = []
        self._check = check

    def turn(self, readable: dict[Any, int]) -> None:
        super().turn(readable)
        if self._check:
            invariants.check(self.core)
        if self._watches:
            with self._lock:
                self._watches = [watch for watch in self._watches if not watch(self.core)]

    def watch(self, watch: Callable[[BrokerCore], bool]) -> None:
        """It is called after each turn (at most a tenth of a second apart) until it returns True."""
        with self._lock:
            self._watches.append(watch)


class BrokerThread:
    def __init__(
        self, config: BrokerConfig, host: str = "127.0.0.1", port: int = 0, *, check: bool = False, **options: Any
    ) -> None:
        """`check`: the invariants are checked after each turn. `options` are those of `BrokerServer`."""
        self.server = WatchedBroker(config, host, port, check=check, **options)
        #: What ended the loop, if it was not `close`.
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="broker", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.server.run()
        except BaseException as error:  # noqa: BLE001  # raised in the thread of the test
            self.error = error

    def look(self, question: Callable[[BrokerCore], T]) -> T:
        """The answer, computed in the thread of the broker between two turns."""
        answers: list[T] = []

        def watch(core: BrokerCore) -> bool:
            answers.append(question(core))
            return True

        self._wait(watch, "a turn of the loop", ANSWER_S)
        return answers[0]

    def until(self, condition: Callable[[BrokerCore], Any], what: str, timeout_s: float) -> None:
        self._wait(lambda core: bool(condition(core)), what, timeout_s)

    def _wait(self, condition: Callable[[BrokerCore], bool], what: str, timeout_s: float) -> None:
        met = threading.Event()
        errors: list[BaseException] = []

        def watch(core: BrokerCore) -> bool:
            try:
                if not condition(core):
                    return False
            except Exception as error:  # noqa: BLE001  # the error is the test's, and the broker goes on
                errors.append(error)
            met.set()
            return True

        self.server.watch(watch)
        came = met.wait(timeout_s)
        if errors:
            raise errors[0]
        if self.error is not None:
            raise AssertionError(f"the loop of the broker has ended: {self.error!r}") from self.error
        assert came, f"not within {timeout_s} s: {what}\n{self.story()}"

    def story(self) -> str:
        """What the broker knows. It is read from another thread: it is for people, and the loop may have ended."""
        if self.error is not None:
            return "".join(traceback.format_exception(self.error))
        state = self.server.core.state
        lines = [f"counters: {state.counters}"]
        lines += [f"{event.at_ms} {event.kind}: {event.text}" for event in list(state.journal.entries)[-PRINTED:]]
        for id in list(state.requests)[:PRINTED]:
            lines.append(f"request {id.hex()}")
            lines += [f"    {at} {what}: {detail}" for at, what, detail in queries.story(state, id)]
        return "\n".join(lines)

    def close(self) -> None:
        self.server.stop()
        self._thread.join(ANSWER_S)
        assert not self._thread.is_alive(), "the loop of the broker does not end"
        self.server.close()
        if self.error is not None:
            raise AssertionError(f"the loop of the broker has ended: {self.error!r}") from self.error
