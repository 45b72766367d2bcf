"""The real broker in a thread of the test, so that a test can ask its core what it knows, and wait for it."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from llambo.broker import invariants
from llambo.broker.config import BrokerConfig
from llambo.broker.core import BrokerCore
from llambo.broker.report import queries
from llambo.broker.report.metrics_http import Window
from llambo.broker.server import BrokerServer
from llambo.mesh.link import sockets
from llambo.mesh.security.keyring import Folder

T = TypeVar("T")
#: How long the thread may take to answer or to end.
ANSWER_S = 30.0
#: Lines of the events feed and stories of requests that are printed.
TOLD = 40


class Watched(BrokerServer):
    """After each turn it looks whether what somebody waits for has come true."""

    def __init__(
        self,
        config: BrokerConfig,
        host: str,
        port: int,
        token_hwm: int,
        check: bool,
        keys: Folder | None,
        window: Window | None,
    ) -> None:
        super().__init__(config, host, port, token_hwm=token_hwm, keys=keys, window=window)
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
        """It is asked after each turn (a tenth of a second apart at the most) until it says True."""
        with self._lock:
            self._watches.append(watch)


class BrokerThread:
    def __init__(
        self,
        config: BrokerConfig,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        token_hwm: int = sockets.TOKEN_HWM,
        check: bool = False,
        keys: Folder | None = None,
        window: Window | None = None,
    ) -> None:
        self.server = Watched(config, host, port, token_hwm, check, keys, window)
        #: What ended the loop, if it was not `close`.
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="broker", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.server.run()
        except BaseException as error:  # noqa: BLE001  # kept, and raised where somebody can see it
            self.error = error

    def look(self, question: Callable[[BrokerCore], T]) -> T:
        """The answer, found in the broker's own thread between two turns."""
        answers: list[T] = []

        def watch(core: BrokerCore) -> bool:
            answers.append(question(core))
            return True

        self._wait(watch, "an answer to a look", ANSWER_S)
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
            except Exception as error:  # noqa: BLE001  # belongs to the test and not to the broker
                errors.append(error)
            met.set()
            return True

        self.server.watch(watch)
        came = met.wait(timeout_s)
        if errors:
            raise errors[0]
        if self.error is not None:
            raise AssertionError(f"the broker's loop has ended: {self.error!r}") from self.error
        assert came, f"within {timeout_s} s there was no sign of: {what}\n{self.story()}"

    def story(self) -> str:
        """What the broker knows. Read from outside: it is for people, and the thread may be dead."""
        if self.error is not None:
            return "".join(traceback.format_exception(self.error))
        state = self.server.core.state
        lines = [f"counters: {state.counters}"]
        lines += [f"{event.at_ms} {event.kind}: {event.text}" for event in list(state.happenings)[-TOLD:]]
        for id in list(state.requests)[:TOLD]:
            lines.append(f"request {id.hex()}")
            lines += [f"    {at} {what}: {detail}" for at, what, detail in queries.story(state, id)]
        return "\n".join(lines)

    def close(self) -> None:
        self.server.stop()
        self._thread.join(ANSWER_S)
        assert not self._thread.is_alive(), "the broker's loop does not end"
        self.server.close()
        if self.error is not None:
            raise AssertionError(f"the broker's loop has ended: {self.error!r}") from self.error
