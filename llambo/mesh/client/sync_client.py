"""The client for programs without an event loop: the asyncio client on a thread of its own."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar, Unpack

from llambo.mesh.client.answer_stream import Answer, Piece, Stream
from llambo.mesh.client.client import NOT_CONNECTED, Client, ClientSettings
from llambo.mesh.client.client_requests import Counters
from llambo.mesh.client.request_options import Messages, Options
from llambo.mesh.wire.errors import Code, LlamboError

T = TypeVar("T")
P = ParamSpec("P")


class SyncStream:
    """A `Stream` without asyncio. Iterate it; leaving the loop early, also by Ctrl-C, cancels the request."""

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
    def note(self) -> str:
        return self._stream.note

    @property
    def model(self) -> str:
        return self._stream.model

    @property
    def fake(self) -> bool:
        return self._stream.fake

    @property
    def answer(self) -> Answer | None:
        return self._stream.answer

    @property
    def over(self) -> bool:
        return self._stream.over

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
        """Stop reading, as `Stream.aclose`."""
        if self._client.connected:
            self._client.run(self._stream.aclose())

    def detach(self) -> None:
        self._client.run(self._stream.detach())

    def __enter__(self) -> SyncStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _blocking(
    method: Callable[Concatenate[Client, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SyncClient, P], T]:
    """The method of `SyncClient` that waits for this method of `Client`."""

    @functools.wraps(method)
    def call(client: SyncClient, /, *args: P.args, **options: P.kwargs) -> T:
        return client.run(method(client._client, *args, **options))

    return call


class SyncClient:
    """A connection to a mesh, without asyncio. Use it with `with`, or call `connect` and `close`. Threads may share it.

    It works in a notebook, or beside a running event loop, too: its own loop is on a thread of its own.
    """

    def __init__(self, address: str = "", **settings: Unpack[ClientSettings]) -> None:
        self._client = Client(address, **settings)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        return self._client.address

    @property
    def connected(self) -> bool:
        """True between `connect` and `close`, also while the broker is lost."""
        return self._loop is not None

    @property
    def broker(self) -> str:
        return self._client.broker

    @property
    def busy(self) -> bool:
        return self._client.busy

    @property
    def on_link(self) -> Callable[[str], None] | None:
        """As in `Client`. It is called on the thread of the client, and must not call the client."""
        return self._client.on_link

    @on_link.setter
    def on_link(self, call: Callable[[str], None] | None) -> None:
        self._client.on_link = call

    @property
    def counters(self) -> Counters:
        return self._client.counters

    # --- connecting --------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Connect to a broker. A client connects once; what is lost later is connected again without a call."""
        if self._loop is not None:
            raise LlamboError(Code.BAD_REQUEST, "a client connects only once; create another one")
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

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop of the client. A Ctrl-C meanwhile cancels it there as well."""
        if self._loop is None:
            work.close()
            raise LlamboError(Code.NO_BROKER, "the client is not connected", hint=NOT_CONNECTED)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    # --- requests ----------------------------------------------------------------------------------------------

    def stream(self, prompt: str | Messages, **options: Unpack[Options]) -> SyncStream:
        """As `Client.stream`."""
        return SyncStream(self.run(self._stream(prompt, options)), self)

    generate = _blocking(Client.generate)
    chat = _blocking(Client.chat)
    submit = _blocking(Client.submit)
    cancel = _blocking(Client.cancel)

    def attach(self, id: str, *, tools: bool = False) -> SyncStream:
        """As `Client.attach`."""
        return SyncStream(self.run(self._client.attach(id, tools=tools)), self)

    def resume(self, prompt: str | Messages, **options: Unpack[Options]) -> SyncStream:
        """As `Client.resume`."""
        return SyncStream(self.run(self._resume(prompt, options)), self)

    async def _stream(self, prompt: str | Messages, options: Options) -> Stream:
        return self._client.stream(prompt, **options)

    async def _resume(self, prompt: str | Messages, options: Options) -> Stream:
        return self._client.resume(prompt, **options)

    # --- tasks, queries and commands ---------------------------------------------------------------------------

    tokenize = _blocking(Client.tokenize)
    detokenize = _blocking(Client.detokenize)
    embed = _blocking(Client.embed)
    rerank = _blocking(Client.rerank)
    model_info = _blocking(Client.model_info)
    query = _blocking(Client.query)
    status = _blocking(Client.status)
    workers = _blocking(Client.workers)
    models = _blocking(Client.models)
    requests = _blocking(Client.requests)
    events = _blocking(Client.events)
    recent = _blocking(Client.recent)
    metrics = _blocking(Client.metrics)
    why = _blocking(Client.why)
    hosts = _blocking(Client.hosts)
    drain = _blocking(Client.drain)
    hold_model = _blocking(Client.hold_model)
    release_model = _blocking(Client.release_model)
    pull_model = _blocking(Client.pull_model)
    lease = _blocking(Client.lease)


async def _wind_up(loop: asyncio.AbstractEventLoop) -> None:
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()
