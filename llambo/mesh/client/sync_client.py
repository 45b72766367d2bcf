"""The client for programs without an event loop: the asyncio client on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

from llambo.mesh.client.answer_stream import Answer, Embeddings, Piece, Stream, Tokenized
from llambo.mesh.client.client import Client, ClientSettings
from llambo.mesh.client.client_requests import Counters
from llambo.mesh.client.request_options import Options, TaskCall
from llambo.mesh.wire import reports
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.tasks import Form, Pooling

T = TypeVar("T")


class SyncStream:
    """An answer as it arrives. Iterate it; leaving the loop early, also by Ctrl-C, cancels the request."""

    def __init__(self, stream: Stream, client: SyncClient) -> None:
        self._stream = stream
        self._client = client

    @property
    def id(self) -> str:
        return self._stream.id

    @property
    def ahead(self) -> int | None:
        return self._stream.ahead

    @property
    def model(self) -> str:
        return self._stream.model

    @property
    def answer(self) -> Answer | None:
        return self._stream.answer

    def __iter__(self) -> Iterator[Piece]:
        try:
            while (piece := self.next_piece()) is not None:
                yield piece
        finally:
            self.close()

    def next_piece(self) -> Piece | None:
        return self._client.run(self._stream.next_piece())

    def result(self) -> Answer:
        return self._client.run(self._stream.result())

    def cancel(self) -> None:
        self._client.run(self._stream.cancel())

    def close(self) -> None:
        if self._client.connected:
            self._client.run(self._stream.aclose())

    def __enter__(self) -> SyncStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SyncClient:
    """A connection to a mesh. Use it with `with`, or call `connect` and `close`. Threads may share it."""

    def __init__(self, address: str = "", **settings: Unpack[ClientSettings]) -> None:
        self._client = Client(address, **settings)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        return self._client.address

    @property
    def connected(self) -> bool:
        return self._loop is not None

    @property
    def counters(self) -> Counters:
        return self._client.counters

    # --- connecting --------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Returns when a broker has sent its welcome."""
        self._loop = asyncio.new_event_loop()
        # A daemon, so that a program that does not call `close` can end.
        self._thread = threading.Thread(target=self._loop.run_forever, name="llambo-client", daemon=True)
        self._thread.start()
        try:
            self.run(self._client.connect())
        except BaseException:
            self._stop()
            raise

    def close(self) -> None:
        """Cancel the requests of this client that are not detached, and disconnect."""
        if self._loop is None:
            return
        try:
            self.run(self._client.close())
        finally:
            self._stop()

    def _stop(self) -> None:
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        if loop is None or thread is None:
            return
        # On its own thread: the thread of the caller may have a running loop, as in a notebook.
        asyncio.run_coroutine_threadsafe(_wind_up(loop), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    def __enter__(self) -> SyncClient:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it on the loop of the client. A Ctrl-C meanwhile cancels it there as well."""
        if self._loop is None:
            work.close()
            raise LlamboError(Code.NO_BROKER, "the client is not connected")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    # --- requests ----------------------------------------------------------------------------------------------

    def stream(self, prompt: str, **options: Unpack[Options]) -> SyncStream:
        """Submit a request now, and read its answer as it arrives."""
        return SyncStream(self.run(self._stream(prompt, options)), self)

    def generate(self, prompt: str, **options: Unpack[Options]) -> Answer:
        """Submit a request, and return its whole answer."""
        return self.run(self._client.generate(prompt, **options))

    def submit(self, prompt: str, *, detached: bool = True, **options: Unpack[Options]) -> str:
        """Submit a request without a stream. Returns its id, for `attach`."""
        return self.run(self._client.submit(prompt, detached=detached, **options))

    def attach(self, id: str) -> SyncStream:
        """Follow a request that was submitted earlier, from its first token."""
        return SyncStream(self.run(self._client.attach(id)), self)

    def cancel(self, id: str) -> str:
        """Stop a request of any client. Returns the reason of its end."""
        return self.run(self._client.cancel(id))

    # --- tasks -------------------------------------------------------------------------------------------------

    def tokenize(
        self,
        text: str,
        *,
        special: bool = False,
        form: Form = "text",
        system: str = "",
        **call: Unpack[TaskCall],
    ) -> Tokenized:
        """The tokens of a prompt with this text."""
        return self.run(self._client.tokenize(text, special=special, form=form, system=system, **call))

    def detokenize(self, ids: Sequence[int], *, special: bool = False, **call: Unpack[TaskCall]) -> str:
        """The text of these tokens."""
        return self.run(self._client.detokenize(ids, special=special, **call))

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        normalized: bool = True,
        pooling: Pooling = "",
        **call: Unpack[TaskCall],
    ) -> Embeddings:
        """Embeddings of texts."""
        return self.run(self._client.embed(texts, normalized=normalized, pooling=pooling, **call))

    def model_info(self, **call: Unpack[TaskCall]) -> dict[str, Any]:
        """Facts about a model, and how it is served."""
        return self.run(self._client.model_info(**call))

    async def _stream(self, prompt: str, options: Options) -> Stream:
        return self._client.stream(prompt, **options)

    # --- questions ---------------------------------------------------------------------------------------------

    def query(self, what: str, argument: str = "") -> Any:
        """The answer of the broker as it was sent."""
        return self.run(self._client.query(what, argument))

    def status(self) -> reports.MeshStatus:
        return self.run(self._client.status())

    def workers(self, name: str = "") -> list[reports.WorkerRow]:
        return self.run(self._client.workers(name))

    def models(self) -> list[reports.ModelRow]:
        return self.run(self._client.models())

    def requests(self) -> list[reports.RequestRow]:
        return self.run(self._client.requests())

    def events(self, since: int = 0) -> list[reports.EventRow]:
        return self.run(self._client.events(since))

    def recent(self, since: int = 0) -> reports.Recent:
        return self.run(self._client.recent(since))

    def metrics(self) -> str:
        return self.run(self._client.metrics())

    def why(self, id: str) -> reports.RequestStory:
        return self.run(self._client.why(id))

    def drain(self, worker: str, undo: bool = False, *, move: bool = False) -> reports.DrainReply:
        return self.run(self._client.drain(worker, undo, move=move))


async def _wind_up(loop: asyncio.AbstractEventLoop) -> None:
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()
