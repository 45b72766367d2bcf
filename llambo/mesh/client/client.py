"""The asyncio client: the public interface to a mesh.

    async with Client("tcp://127.0.0.1:7330") as client:
        async for piece in client.stream("What is AI?"):
            print(piece.text, end="", flush=True)

The address may be a list, `tcp://a:7330,tcp://b:7330`, or a name with several IP addresses: the client then uses one of
these brokers, and another one when that is lost.

The client runs on the event loop of its caller. It has no thread of its own, except while it looks up a name; libzmq
has one for its sockets. Errors are raised as `LlamboError`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, TypeVar, Unpack

import msgspec
import zmq

from llambo.mesh.client import client_events as e
from llambo.mesh.client.answer_stream import Answer, Piece, Stream, Waiters, reject, resolve
from llambo.mesh.client.client_core import ClientCore
from llambo.mesh.client.client_requests import Counters
from llambo.mesh.client.client_shell import ClientShell
from llambo.mesh.client.request_options import (
    CLIENT_DEFAULTS,
    ClientSettings,
    Context,
    Messages,
    Options,
    TaskCall,
    build_request,
    chat_prompt,
    encode_prompt,
    refuse_text,
    request_id,
    task_input,
    task_request,
)
from llambo.mesh.client.task_results import (
    Collector,
    Embeddings,
    RankedDocument,
    Ranking,
    Tokenized,
    decoded,
    embeddings_of,
    ranking_of,
)
from llambo.mesh.link import sockets
from llambo.mesh.link.link_core import LinkProblem
from llambo.mesh.security import keys
from llambo.mesh.wire import limits, reports, tasks
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo, LlamboError

T = TypeVar("T")
#: The hint if a broker does not know the hello of a client.
WORKER_PORT = "this is a broker's port for workers; clients use its first port, which it prints when it starts"
#: The hint if a client is used before it is connected, or after it was closed.
NOT_CONNECTED = "use a client in its `with` block, or call connect() first; after close() create another one"

log = logging.getLogger(__name__)

DEFAULT_ADDRESS = f"tcp://127.0.0.1:{sockets.DEFAULT_PORT}"
ADDRESS_ENV = "LLAMBO_BROKER"


class Client:
    """A connection to a mesh, for asyncio. Use it with `async with`, or call `connect` and `close`.

    Any number of requests may run on it at a time. It belongs to the event loop on which it was connected.
    """

    def __init__(self, address: str = "", **settings: Unpack[ClientSettings]) -> None:
        """Without an address: `LLAMBO_BROKER`, or the one in the key, or that of a broker on this machine."""
        unknown = sorted(settings.keys() - ClientSettings.__optional_keys__)
        if unknown:
            raise LlamboError(Code.BAD_SETTING, f"a client has no setting {unknown[0]!r}")
        self._settings: ClientSettings = {**CLIENT_DEFAULTS, **settings}
        self._key = keys.wanted(self._settings["key"], os.environ)
        #: The address of the broker, or of several, with commas between them.
        self.address: str = (
            address or os.environ.get(ADDRESS_ENV) or (self._key.address if self._key else DEFAULT_ADDRESS)
        )
        sockets.split_all(self.address)
        name = self._settings["name"][: limits.NAME_CHARS]
        hello = m.ClientHello(name=name, incarnation=secrets.token_bytes(8))
        self._core = ClientCore(hello, give_up_ms=self._settings["lost_ms"])
        self._shell: ClientShell | None = None
        self._context: Context | None = None
        self._welcomed: asyncio.Future[None] | None = None
        self._waiters = Waiters(self._error)
        self._numbers = count(1)
        #: A function of yours, called with the cause when the broker is lost, and with "" when one answers again.
        self.on_link: Callable[[str], None] | None = None
        #: A function of yours, called with what a task waits for (as `embed`), whenever that changes.
        self.on_wait: Callable[[str], None] | None = None
        self._lost = ""

    # --- connecting --------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Connect to a broker. A client connects once; what is lost later is connected again without a call."""
        if self._welcomed is not None:
            raise LlamboError(Code.BAD_REQUEST, "a client connects only once; create another one")
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(None, sockets.resolve_all, self.address)
        self._context = self._settings["context"] or zmq.Context()
        self._welcomed = loop.create_future()
        self._shell = ClientShell(
            self._core,
            self.address,
            self._context,
            token_hwm=self._settings["token_hwm"],
            first=self._settings["first"],
            key=self._key,
            deliver=self._deliver,
            broken=self._on_broken,
        )
        self._shell.begin(found)
        try:
            async with asyncio.timeout(self._settings["connect_ms"] / 1_000):
                await self._welcomed
        except TimeoutError:
            await self.close()
            raise self._no_broker() from None
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Cancel the requests of this client that are not detached, and disconnect."""
        shell, self._shell = self._shell, None
        if shell is None:
            return
        shell.handle(e.LeaveAsked("the client was closed"))
        shell.close()
        self._waiters.fail_all(LlamboError(Code.NO_BROKER, "the client was closed", hint=NOT_CONNECTED))
        if self._context is not None and self._settings["context"] is None:
            # It waits until the last messages are sent, for LINGER_MS at most.
            await asyncio.get_running_loop().run_in_executor(None, self._context.term)

    async def __aenter__(self) -> Client:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- requests ----------------------------------------------------------------------------------------------

    def stream(self, prompt: str | Messages, **options: Unpack[Options]) -> Stream:
        """Submit a request now, and read its answer as it arrives.

        A text is the message of a user, put into the chat template of the model as `llambo send` does; with
        `form="text"` the model continues it as it is. A list of messages is a conversation, as for `chat`.
        """
        return self._submit(prompt, options, resume=False)

    def resume(self, prompt: str | Messages, **options: Unpack[Options]) -> Stream:
        """Submit a request again, with its `id`, prompt and options, because the client that submitted it is gone.

        Its answer comes from the first token. If no broker and no worker has it, it is made again with the same seed,
        which need not give the same tokens.
        """
        return self._submit(prompt, options, resume=True)

    async def generate(self, prompt: str | Messages, **options: Unpack[Options]) -> Answer:
        """Submit a request as `stream` does, and return its whole answer. If the caller is cancelled, so is it."""
        if options.get("stream") is None:
            options["stream"] = False
        async with self.stream(prompt, **options) as stream:
            return await stream.result()

    async def chat(self, messages: Messages, **options: Unpack[Options]) -> Answer:
        """The answer to a conversation: a list of messages with `role` and `content`, as in OpenAI's chat API.

        The roles are system, user, assistant and tool. `answer.message` is the message to add before the next question.
        `stream` and `submit` accept a list of messages as well.
        """
        refuse_text(messages)
        return await self.generate(messages, **options)

    async def submit(self, prompt: str | Messages, *, detached: bool = True, **options: Unpack[Options]) -> str:
        """Submit a request as `stream` does, without reading its answer. Returns its id, for `attach`.

        A detached request runs on when this client leaves, and its answer is stored for a while. With `detached=False`
        it ends with this client.
        """
        request, encoded = self._build(prompt, detached, options)
        accepted = self._waiters.submits[request.id] = asyncio.get_running_loop().create_future()
        try:
            self._handle(e.SubmitAsked(request, encoded, follow=False))
            await accepted
        except asyncio.CancelledError:
            # The caller will never know its id.
            self._handle(e.CancelAsked(request.id, drop=True))
            raise
        finally:
            del self._waiters.submits[request.id]
        self._waiters.remember(request, encoded)
        return request.id.hex()

    async def attach(self, id: str, *, tools: bool = False) -> Stream:
        """Follow a request that was submitted earlier, also by another client, from its first token.

        The first digits of the id are enough, at least four. `tools`: it was submitted with tools, so that its answer
        may have calls.
        """
        key = await self._find(id)
        if key in self._waiters.streams:
            raise LlamboError(Code.BAD_REQUEST, f"this client already follows request {key.hex()}")
        stream = self._follow(key, mine=False, tools=tools)
        self._handle(e.AttachAsked(key, again=self._waiters.submitted.get(key)))
        return stream

    async def cancel(self, id: str) -> str:
        """Stop a request. Returns the reason of its end: `cancelled`, unless it had ended before.

        With keys only an admin can stop those of other names.
        """
        key = await self._find(id)
        cancels = self._waiters.cancels
        ended = cancels.get(key)
        if ended is None:
            ended = cancels[key] = asyncio.get_running_loop().create_future()
            self._handle(e.CancelAsked(key))
        end = await self._in_time(asyncio.shield(ended), f"no answer to the cancel of {key.hex()}")
        return end.reason

    # --- tasks -------------------------------------------------------------------------------------------------

    async def tokenize(
        self,
        text: str | Messages,
        *,
        special: bool = False,
        form: tasks.Form = "text",
        system: str = "",
        **call: Unpack[TaskCall],
    ) -> Tokenized:
        """The tokens of a text as it is; with `form="user"`, or of a list of messages, with the chat template.

        `special`: names of control tokens in the text are read as those tokens.
        """
        if not isinstance(text, str):
            chat = chat_prompt(text, sampling={"system": system} if system else {})
            text, form = chat.text, chat.form
        data = encode_prompt(text)
        options = tasks.TaskOptions(form=form, system=system, special=special)
        found, _ = await self._task("tokenize", data, 1, options, call, tasks.TokenizeResult)
        return Tokenized(found.ids, found.pieces)

    async def detokenize(self, ids: Sequence[int], *, special: bool = False, **call: Unpack[TaskCall]) -> str:
        """The text of these tokens. `special`: control tokens appear by their names; otherwise they are left out."""
        options = tasks.TaskOptions(special=special)
        data = task_input(list(ids), tasks.Ids)
        found, _ = await self._task("detokenize", data, len(ids), options, call, tasks.DetokenizeResult)
        return found.text.decode(errors="replace")

    async def embed(
        self,
        texts: str | Sequence[str],
        *,
        normalized: bool = True,
        pooling: tasks.Pooling = "",
        dimensions: int | None = None,
        **call: Unpack[TaskCall],
    ) -> Embeddings:
        """Embeddings of texts. Many at once cost less than one by one.

        `pooling`: "mean" or "last", for a model that generates; one for embeddings has its own. `dimensions`: only the
        first so many numbers of each vector, for models that were trained for that (Matryoshka).
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        if not 0 < len(given) <= limits.EMBED_INPUTS:
            raise LlamboError(Code.BAD_REQUEST, f"{len(given)} texts to embed, 1 to {limits.EMBED_INPUTS} are allowed")
        options = tasks.TaskOptions(normalized=normalized, pooling=pooling)
        data = task_input(given, tasks.Texts)
        found, by = await self._task("embed", data, len(given), options, call, tasks.EmbedResult)
        return embeddings_of(found, dimensions, by)

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        raw: bool = False,
        **call: Unpack[TaskCall],
    ) -> Ranking:
        """How well each document fits the query, the best first, by a model that reranks.

        `top_n`: only so many of them. `raw`: scores as the model gives them, and not from 0 to 1.
        """
        given = list(documents)
        if not 0 < len(given) <= limits.RERANK_DOCUMENTS:
            text = f"{len(given)} documents to rerank, 1 to {limits.RERANK_DOCUMENTS} are allowed"
            raise LlamboError(Code.BAD_REQUEST, text)
        data = task_input({"query": query, "documents": given}, tasks.RerankInput)
        found, by = await self._task(
            "rerank", data, len(given), tasks.TaskOptions(raw=raw), call, tasks.RerankResult
        )  # fmt: skip
        return ranking_of(found, given, top_n, by)

    async def model_info(self, **call: Unpack[TaskCall]) -> dict[str, Any]:
        """Facts about a model, how it is served, and the sampling of requests that set none.

        The names are those of `llambo models NAME --json`.
        """
        return (await self._task("model_info", b"", 1, tasks.TaskOptions(), call, dict[str, Any]))[0]

    # --- queries and commands ----------------------------------------------------------------------------------

    async def query(self, what: str, argument: str = "") -> Any:
        """The answer to a query as it was sent, including fields that this version does not know.

        `what` is status, workers, models, requests, events, recent or why; for each there is a method with types.
        """
        return await self._ask(what, argument, Any)

    async def status(self) -> reports.MeshStatus:
        """Figures of the mesh."""
        return await self._ask("status", "", reports.MeshStatus)

    async def workers(self, name: str = "") -> list[reports.WorkerRow]:
        """All workers, or only the one with this name, if it is connected."""
        return await self._ask("workers", name, list[reports.WorkerRow])

    async def models(self) -> list[reports.ModelRow]:
        """The models that can be asked for, by name."""
        return await self._ask("models", "", list[reports.ModelRow])

    async def requests(self) -> list[reports.RequestRow]:
        """The requests that wait or run; with keys those of the own name, or for an admin all."""
        return await self._ask("requests", "", list[reports.RequestRow])

    async def events(self, since: int = 0) -> list[reports.EventRow]:
        """What happened in the mesh after event number `since`. With keys only an admin can read it."""
        return await self._ask("events", str(since), list[reports.EventRow])

    async def recent(self, since: int = 0) -> reports.Recent:
        """One sample for each second after sample number `since`, and what ended meanwhile; five minutes at most."""
        return await self._ask("recent", str(since), reports.Recent)

    async def metrics(self) -> str:
        """The broker's page for Prometheus. With keys only an admin can read it."""
        return (await self._ask("metrics", "", reports.MetricsPage)).page

    async def why(self, id: str) -> reports.RequestStory:
        """The story of one request. The first digits of its id are enough, at least four."""
        return await self._ask("why", id, reports.RequestStory)

    async def drain(self, worker: str, undo: bool = False, *, move: bool = False) -> reports.DrainReply:
        """Give a worker no new work, or with `undo` work again. `move`: its running requests move to other workers.

        With keys only an admin can do it.
        """
        return await self._question(
            lambda n: e.CommandAsked(m.DrainWorker(n, worker, undo, move)), "drain", reports.DrainReply
        )

    async def hosts(self) -> list[reports.HostRow]:
        """The hosts that load models on demand, with their memory."""
        return await self._ask("hosts", "", list[reports.HostRow])

    async def hold_model(
        self, model: str, *, host: str = "", holder: str = "", ttl_ms: int = 0, pin: bool = False
    ) -> reports.HoldReply:
        """Load a model, on this host or where it fits best, and keep it loaded. The answer does not wait for the load.

        `holder` tells several uses of one key apart; each is given back alone. It counts for `ttl_ms`, or until it is
        given back; a call with the same holder renews it. With keys only an admin holds a model for longer than an hour
        at a time, or pins it: a pinned model is never unloaded for another one.
        """
        return await self._hold(m.HoldModel(0, model, host, holder, ttl_ms, pin))

    async def release_model(self, model: str, *, host: str = "", holder: str = "") -> reports.HoldReply:
        """Give back what `hold_model` holds. Without a holder an admin gives back all of them, and it is unloaded."""
        return await self._hold(m.HoldModel(0, model, host, holder, undo=True))

    async def _hold(self, order: m.HoldModel) -> reports.HoldReply:
        what = "release_model" if order.undo else "hold_model"
        return await self._question(
            lambda n: e.CommandAsked(msgspec.structs.replace(order, query=n)), what, reports.HoldReply
        )

    async def pull_model(self, ref: str, to: str = "all", *, poll: bool = False) -> reports.PullReply:
        """Let hosts have the files of a model: one downloads them from outside the mesh, the others get them from it.

        `ref` names the model at its source (`hf:`, `ollama:`, `https:`), `to` a host, a class, or all. The answer does
        not wait: a call with `poll` asks how far it is. With keys only an admin may do it.
        """
        return await self._question(
            lambda n: e.CommandAsked(m.PullModel(n, ref, to, poll)), "pull_model", reports.PullReply
        )

    async def lease(self, lease: m.Lease) -> reports.LeaseReply:
        """Ask for a lease, which has one holder at a time, as an orchestrator does. The client sets its `query`.

        With keys only an admin can have it.
        """
        return await self._question(
            lambda n: e.CommandAsked(msgspec.structs.replace(lease, query=n)), "lease", reports.LeaseReply
        )

    @property
    def broker(self) -> str:
        """The address of the broker that this client uses now; empty while it has none."""
        place = self._shell.broker if self._shell is not None and self._core.link.welcomed else None
        return sockets.endpoint(*place) if place else ""

    @property
    def busy(self) -> bool:
        """True while a stream of this client is open."""
        return bool(self._waiters.streams)

    @property
    def counters(self) -> Counters:
        """What this client has received, sent again and repaired, since it was created."""
        return self._core.counters

    # --- inside: asking ----------------------------------------------------------------------------------------

    async def _task(
        self, task: m.Task, data: bytes, inputs: int, options: tasks.TaskOptions, call: TaskCall, kind: type[T]
    ) -> tuple[T, Collector]:
        """Run a task, and return its result, and what knows the model. If the caller is cancelled, so is the task."""
        request = task_request(task, inputs, len(data), options, call)
        collector = self._waiters.streams[request.id] = Collector(self.on_wait)
        self._handle(e.SubmitAsked(request, data))
        try:
            result = await collector.result
        except asyncio.CancelledError:
            self._handle_for_stream(e.CancelAsked(request.id, drop=True))
            raise
        return decoded(result, kind, f"the result of {task}"), collector

    async def _ask(self, what: str, argument: str, kind: type[T]) -> T:
        return await self._question(lambda number: e.QueryAsked(number, what, argument), what, kind)

    async def _question(self, ask: Callable[[int], e.Event], what: str, kind: type[T]) -> T:
        number = next(self._numbers)
        answer = self._waiters.questions[number] = asyncio.get_running_loop().create_future()
        try:
            self._handle(ask(number))
            data = await self._in_time(answer, f"no answer to {what!r}")
        finally:
            del self._waiters.questions[number]
            self._forget(number)
        return decoded(data, kind, f"the answer to {what!r}")

    async def _in_time(self, awaited: asyncio.Future[T], text: str) -> T:
        try:
            async with asyncio.timeout(self._settings["query_ms"] / 1_000):
                return await awaited
        except TimeoutError:
            if not self._core.link.welcomed:
                raise self._no_broker() from None
            raise LlamboError(Code.TIMEOUT, f"{text} within {self._settings['query_ms']} ms") from None

    async def _find(self, id: str) -> bytes:
        """A complete id is used as it is. The broker completes the beginning of an id."""
        if len(id) == 2 * limits.REQUEST_ID_BYTES:
            with suppress(ValueError):
                return bytes.fromhex(id)
        found = await self._ask("find", id, reports.FoundRequest)
        try:
            return bytes.fromhex(found.id)
        except ValueError as error:
            raise LlamboError(Code.BAD_MESSAGE, f"the broker answered a query for {id!r} with {found.id!r}") from error

    def _submit(self, prompt: str | Messages, options: Options, *, resume: bool) -> Stream:
        request, encoded = self._build(prompt, False, options)
        if request.id in self._waiters.streams:
            raise LlamboError(Code.BAD_REQUEST, f"this client already follows request {request.id.hex()}")
        stream = self._follow(request.id, mine=True, tools=bool(options.get("tools")))
        self._handle(e.SubmitAsked(request, encoded, resume=resume))
        return stream

    def _build(self, prompt: str | Messages, detached: bool, options: Options) -> tuple[m.InferenceRequest, bytes]:
        """The seed comes from the id if none is given, so that another client can submit the same request again."""
        id = request_id(options.get("id"))
        return build_request(id, int.from_bytes(id[:7], "big"), prompt, detached, options)

    def _follow(self, id: bytes, *, mine: bool, tools: bool = False) -> Stream:
        stream = self._waiters.streams[id] = Stream(id, self._handle_for_stream, mine=mine, tools=tools)
        return stream

    def _handle(self, event: e.Event) -> None:
        if self._shell is None or self._shell.closed:
            raise LlamboError(Code.NO_BROKER, "the client is not connected", hint=NOT_CONNECTED)
        self._shell.handle(event)

    def _handle_for_stream(self, event: e.Event) -> None:
        """A stream may outlive its client. Then its events are dropped."""
        match event:
            case e.ReaderLeft(bytes() as id) | e.CancelAsked(id, True):
                self._waiters.streams.pop(id, None)
        if self._shell is not None:
            self._shell.handle(event)

    def _forget(self, key: bytes | int) -> None:
        if self._shell is not None:
            self._shell.handle(e.ReaderLeft(key))

    # --- inside: deliveries -------------------------------------------------------------------------------

    def _deliver(self, action: e.Delivery | e.ReportLink) -> None:
        if not isinstance(action, e.ReportLink):
            self._waiters.deliver(action)
            return
        problem = action.problem
        log.debug("link %s%s", action.state.value, f": {problem.text}" if problem else "")
        if self._core.link.welcomed:
            resolve(self._welcomed, None)
            self._report_link("")
        elif problem is not None and self._welcomed is not None and self._welcomed.done():
            self._report_link(problem.text or LinkProblem.NO_ANSWER.value)
        elif problem is not None and not (error := self._error(problem)).retryable:
            if error.code is Code.UNKNOWN_TYPE:  # of the hello
                error = LlamboError(error.code, error.text, hint=WORKER_PORT)
            reject(self._welcomed, error)

    def _report_link(self, lost: str) -> None:
        """Report only changes: each attempt to connect changes the link as well."""
        if bool(lost) != bool(self._lost):
            self._lost = lost
            if self.on_link is not None:
                self.on_link(lost)

    def _on_broken(self, error: Exception) -> None:
        broken = LlamboError(Code.INTERNAL, f"the client is broken: {error!r}")
        reject(self._welcomed, broken)
        self._waiters.fail_all(broken)

    def _error(self, info: ErrorInfo) -> LlamboError:
        return self._no_broker() if info.code is Code.NO_BROKER else LlamboError.of(info)

    def _no_broker(self) -> LlamboError:
        address = ",".join(sockets.endpoint(*each) for each in sockets.split_all(self.address))
        if self._core.link.cause is LinkProblem.NO_HANDSHAKE:
            return LlamboError(Code.NO_BROKER, f"no broker answers at {address}: {LinkProblem.NO_HANDSHAKE.value}")
        text = f"no broker answers at {address}; start one with `llambo-broker` or `llambo up`"
        return LlamboError(Code.NO_BROKER, text)


__all__ = [
    "DEFAULT_ADDRESS", "Answer", "Client", "ClientSettings", "Embeddings", "Options", "Piece", "RankedDocument",
    "Ranking", "Stream", "TaskCall", "Tokenized",
]  # fmt: skip
