"""A stream that is read in the background while something else happens, and must not be disturbed."""

from __future__ import annotations

import threading
from types import TracebackType

from llambo.mesh.client.sync_client import SyncClient
from llambo.mesh.wire.identity import PeerKey
from llambo.testing.mesh import Mesh, truth
from llambo.testing.processes import TIMEOUT_S

#: More than is ever read: it goes on until it is cancelled.
TOKENS = 100_000
#: What has to be read before and after.
MARGIN = 20


class Healthy:
    """Before the body there is a stream that runs; after it the stream still runs, and everything was right."""

    def __init__(self, mesh: Mesh, prompt: str = "healthy", seed: int = 1, key: PeerKey | str = "") -> None:
        self.ids: list[int] = []
        self.error: BaseException | None = None
        self._mesh = mesh
        self._prompt, self._seed = prompt, seed
        self._news = threading.Condition()
        self._client = SyncClient(mesh.address, key=key)
        self._thread = threading.Thread(target=self._read, name="healthy")

    def __enter__(self) -> Healthy:
        self._client.connect()
        self._stream = self._client.stream(self._prompt, max_tokens=TOKENS, seed=self._seed)
        self._thread.start()
        self.until(MARGIN)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.until(len(self.ids) + MARGIN)
            self._stream.cancel()
            self._thread.join(TIMEOUT_S)
            if error is None:
                self._judge()
        finally:
            self._client.close()
            self._thread.join(TIMEOUT_S)

    def _judge(self) -> None:
        assert self.error is None
        answer = self._stream.answer
        assert answer is not None and (answer.reason, answer.moves) == ("cancelled", 0)
        assert self.ids == truth(self._prompt, self._seed, len(self.ids))
        # And a new client is served as well
        after = self._client.generate("after", max_tokens=10, seed=2)
        assert (after.ids, after.reason) == (truth("after", 2, 10), "length")

    def _read(self) -> None:
        try:
            for piece in self._stream:
                with self._news:
                    assert piece.index == len(self.ids), "a token is missing, or came twice"
                    self.ids += piece.ids
                    self._news.notify_all()
        except BaseException as error:  # noqa: BLE001  # it is judged in the thread of the test
            self.error = error

    def until(self, count: int) -> None:
        with self._news:
            came = self._news.wait_for(lambda: len(self.ids) >= count or not self._thread.is_alive(), TIMEOUT_S)
        if not came or len(self.ids) < count:
            self._mesh.print_story()
        assert self.error is None, self.error
        assert len(self.ids) >= count, f"the healthy stream has {len(self.ids)} tokens, {count} should be there"
