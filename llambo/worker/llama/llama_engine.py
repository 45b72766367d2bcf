"""The llama.cpp engine: requests between the batching core, which plans steps, and the decoder, which computes them.

A request is a `Stream`: a sampler that chooses tokens, a gate that releases text, and a few counts. `start` refuses a
request that cannot succeed (too long, an unusable template or grammar) before anything is computed. `step` decodes one
plan of the batching core and gives each request its next token. The prompt of a continued request ends with the tokens
it has already: they are prefilled like any other, and accepted by its sampler and its gate.

Cancels and deadlines take effect between steps, and the core keeps steps short.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from llambo.mesh.service import host
from llambo.mesh.wire import limits
from llambo.mesh.wire.conversation import Chat
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.messages import ModelInfo, Reason, Task, Usage
from llambo.mesh.wire.naming import adapter_fingerprint, with_adapter
from llambo.mesh.wire.timers import NEVER_MS
from llambo.mesh.wire.tokens import Logprob
from llambo.worker.config import Adapter
from llambo.worker.engine.protocol import Fault, NoSuchAdapter, Output, Progress, Ready, Refused, Start, adapter_of
from llambo.worker.llama import llama
from llambo.worker.llama.batching import Batcher, Plan
from llambo.worker.llama.embedder import Embedder
from llambo.worker.llama.grammar import AnswerGrammar, GrammarError, grammar_of
from llambo.worker.llama.guide import Guides
from llambo.worker.llama.llama_tasks import NoRoom, Tasks
from llambo.worker.llama.prompt import BadPrompt, Template, TooLong, chat_of, prompt_text
from llambo.worker.llama.sampling import (
    DeadEnd,
    Defaults,
    Grammar,
    Logits,
    Sampler,
    logprob_of,
    numeric_options,
    with_defaults,
)
from llambo.worker.llama.text_gate import TextGate
from llambo.worker.models import model_files
from llambo.worker.models.placement import CPU, Placement
from llambo.worker.models.purpose import Purpose

#: The prompt of the self-test has more than one token, because only then forbidden instructions are used.
SELF_TEST = b"The quick brown fox jumps over the lazy dog. " * 4
SELF_TEST_TOKENS = 8


@dataclass(slots=True)
class Stream:
    key: bytes
    sampler: Sampler
    gate: TextGate
    index: int
    limit: int
    prompt_tokens: int
    cached_tokens: int
    started: float
    deadline_ms: int
    first: float = 0.0
    #: Likeliest tokens to report beside each token; None: no log probabilities.
    top: int | None = None
    #: Of the tokens that the gate holds back.
    logprobs: list[Logprob] = field(default_factory=list)

    def take_logprobs(self, tokens: int) -> list[Logprob] | None:
        """Those of the first tokens, which the gate has released."""
        if self.top is None:
            return None
        taken = self.logprobs[:tokens]
        del self.logprobs[:tokens]
        return taken


@dataclass(frozen=True, slots=True)
class Setup:
    """What to load, and how to serve it."""

    #: The model's name in the mesh.
    name: str
    path: str
    layout: model_files.Layout
    placement: Placement = CPU
    #: What the note of the worker adds about devices.
    device_note: str = ""
    #: Without what may not work on this machine.
    safe: bool = False
    fingerprint: str = ""
    #: Sampling options that the model's file recommends.
    defaults: Defaults = field(default_factory=dict)
    #: Memory for embeddings, checked when the first one is requested. 0: not checked.
    embed_bytes: int = 0
    purpose: Purpose = field(default_factory=Purpose)
    adapters: tuple[Adapter, ...] = ()
    #: For `Ready.memory_bytes`.
    measure: Callable[[], int] = lambda: 0

    def load(self, send: Callable[[Progress], None]) -> llama.Model:
        """Reports each percent."""
        percent = -1

        def on_progress(share: float) -> None:
            nonlocal percent
            if int(share * 100) > percent:
                percent = int(share * 100)
                send(Progress(f"loading {self.name}: {percent} %", percent=percent))

        return llama.Model(self.path, self.placement, safe=self.safe, on_progress=on_progress)

    def ready(self, model: llama.Model, context: int) -> Ready:
        note = f"{model.describe()}, {self.layout.slots} x {context} tokens"
        note += f", {self.device_note}" if self.device_note else ""
        note += ", safe settings" if self.safe else ""
        infos = [ModelInfo(self.name, self.fingerprint, context, self.purpose.kind)]
        for adapter in self.adapters:
            name, digest = with_adapter(self.name, adapter.name), model_files.digest(adapter.path)
            infos.append(ModelInfo(name, adapter_fingerprint(self.fingerprint, digest), context, self.purpose.kind))
        return Ready(infos, self.layout.slots, note, str(llama.open_library()), self.measure())

    def facts(self, model: llama.Model, context: int) -> dict[str, Any]:
        """What `model_info` says of any model."""
        return {
            "model": self.name,
            "kind": self.purpose.kind,
            "description": model.describe(),
            "fingerprint": self.fingerprint,
            "architecture": model.metadata("general.architecture"),
            "parameters": model.parameters,
            "layers": model.layers,
            "devices": str(self.placement),
            **({"placement": self.placement.why} if self.placement.why else {}),
            "vocabulary": model.tokens,
            "embedding_size": model.embedding_size,
            "trained_context": model.trained_context,
            "context_tokens": context,
            "slots": self.layout.slots,
            "safe": self.safe,
            **({"adapters": [adapter.name for adapter in self.adapters]} if self.adapters else {}),
        }


class LlamaEngine:
    """Loads and tests the model when it is created. `send` gets progress meanwhile."""

    fault: Fault | None = None

    def __init__(self, setup: Setup, send: Callable[[Progress], None] = lambda progress: None) -> None:
        layout = setup.layout
        self._setup = setup
        self._model = setup.load(send)
        #: By name; the empty one is the model alone.
        self._adapters = {"": 0} | {each.name: self._model.load_adapter(each.path) for each in setup.adapters}
        self._adapter_in_use = ""
        self._decoder = llama.Decoder(self._model, layout)
        self.batcher = Batcher(layout.slots, self._decoder.context, self._decoder.rows)
        self._shared = llama.shared_candidates(self._model)
        self._guides = Guides(self._model)
        self._streams: dict[bytes, Stream] = {}
        source = self._model.metadata("tokenizer.chat_template")
        self._template = Template(source, bos=self._model.bos, eos=self._model.eos) if source else None
        self._knows_tools = self._template is not None and self._template.knows_tools
        self._tasks = Tasks(
            self._model,
            self._template,
            context=self._decoder.context,
            make_embedder=self._make_embedder,
            info=self._info,
        )
        send(Progress(f"testing {setup.name}"))
        for adapter in (None, *setup.adapters):
            self._test(adapter)

    def ready(self) -> Ready:
        return self._setup.ready(self._model, self._decoder.context)

    def start(self, start: Start, now_ms: int) -> Refused | None:
        if start.task == "rerank":
            return Refused(start.key, not_for(self._setup, start.task), final=True)
        try:
            adapter = adapter_of(start.model, self._setup.name, self._setup.adapters)
        except NoSuchAdapter as error:
            return Refused(start.key, error.info)
        if start.task == "embed" and adapter is not None:
            text = f"embeddings are computed without adapters; ask {self._setup.name!r} for them"
            return _refused(start, Code.BAD_REQUEST, text)
        if start.task != "generate":
            return self._tasks.start(start, now_ms)
        started = time.perf_counter()
        if self._setup.defaults:
            sampling = with_defaults(start.sampling, start.given, self._setup.defaults)
            start = msgspec.structs.replace(start, sampling=sampling)
        try:
            chat = chat_of(start.prompt, start.sampling)
            prompt = self._prompt(start, chat)
        except BadPrompt as error:
            code = Code.TOO_LONG if isinstance(error, TooLong) else Code.BAD_REQUEST
            return _refused(start, code, str(error))
        context = self._decoder.context
        limit = start.max_tokens
        if start.sampling.fit:
            limit = max(1, min(limit, context - len(prompt)))
        if len(prompt) + limit > context:
            text = f"{len(prompt)} prompt tokens + max_tokens {limit} exceed the context of {context}"
            return _refused(start, Code.TOO_LONG, text)
        if self.batcher.running >= (slots := self._setup.layout.slots):
            return Refused(start.key, ErrorInfo(Code.BUSY, f"all {slots} slots of this engine are taken"))
        try:
            sampler = self._sampler(start, prompt, chat)
        except (GrammarError, ValueError) as error:
            return _refused(start, Code.BAD_REQUEST, str(error))
        gate = TextGate(start.sampling.stop)
        gate.replay([(token, self._model.piece(token)) for token in start.prefix])
        self._streams[start.key] = Stream(
            start.key, sampler, gate,
            index=len(start.prefix), limit=limit, prompt_tokens=len(prompt),
            cached_tokens=self._place(start.key, prompt + start.prefix, adapter), started=started,
            deadline_ms=now_ms + start.deadline_ms if start.deadline_ms else NEVER_MS,
            top=start.logprobs,
        )  # fmt: skip
        return None

    def stop(self, key: bytes) -> None:
        if self._streams.pop(key, None) is not None:
            self.batcher.finish(key)
        self._tasks.stop(key)

    def next_wakeup_ms(self) -> int:
        return 0 if self._streams or self._tasks.pending else NEVER_MS

    def step(self, now_ms: int) -> list[Output]:
        outputs = [
            self._end(stream, "deadline", *stream.gate.flush())
            for stream in list(self._streams.values())
            if now_ms >= stream.deadline_ms
        ]
        began = time.perf_counter()
        plan = self.batcher.plan()
        if plan is not None:
            rows = self._decode(plan)
            for (_, key), row in zip(plan.outputs, rows, strict=True):
                outputs.append(self._advance(self._streams[key], row))
        if self._tasks.pending:
            outputs += self._tasks.step(now_ms, (time.perf_counter() - began) * 1000 if plan is not None else 0.0)
        # A token that is held back has no output; the message as a whole still shows that the engine is alive.
        return [output for output in outputs if output.ids or output.end is not None]

    def cells(self, slot: int) -> int:
        """Cells of the decoder's cache for a slot. The batcher has to have the same number."""
        return self._decoder.cells(slot)

    def forget(self) -> None:
        """Remove everything from the cache that no running request uses."""
        for slot in self.batcher.forget():
            self._decoder.cut(slot, 0)

    # Tasks.

    def _make_embedder(self) -> Embedder:
        free_bytes = host.free_memory_bytes()
        if self._setup.embed_bytes > free_bytes:
            need, free = self._setup.embed_bytes // model_files.MIB, free_bytes // model_files.MIB
            raise NoRoom(
                f"embeddings need {need} MiB beside the model, {free} MiB are free; a smaller --ctx needs less"
            )
        try:
            return Embedder(self._model, self._setup.layout, self._decoder.context, self._setup.purpose)
        except llama.LoadError as error:
            raise NoRoom(str(error)) from error

    def _info(self) -> dict[str, Any]:
        model = self._model
        return {
            **self._setup.facts(model, self._decoder.context),
            "kv_type": self._setup.layout.kv_type,
            "bos": model.bos,
            "eos": model.eos,
            "sampling": numeric_options(self._setup.defaults),
            "sampling_from_model": sorted(self._setup.defaults),
            "chat_template": model.metadata("tokenizer.chat_template"),
        }

    # Starting a request.

    def _prompt(self, start: Start, chat: Chat) -> list[int]:
        text, templated = prompt_text(start.prompt, chat, self._template)
        context, longest = self._decoder.context, self._model.longest_piece_bytes
        if len(text) > context * longest:
            # Known without tokenizing, which takes long for megabytes while all other requests wait.
            least = len(text) // longest
            raise TooLong(f"a prompt of {len(text)} bytes is more than {least} tokens, and the context is {context}")
        tokens = self._model.tokenize(text, special=templated)
        if not tokens:
            raise BadPrompt("the prompt is empty")
        return tokens

    def _sampler(self, start: Start, prompt: list[int], chat: Chat) -> Sampler:
        options = start.sampling
        sampler = Sampler(
            options,
            start.seed,
            llama.Candidates(self._model, options, self._shared, prompt),
            history=list(prompt),
            grammar=self._grammar(grammar_of(options, chat.tools, parallel=self._knows_tools)),
            banned=self._model.endings if options.ignore_eos else None,
        )
        for token in start.prefix:
            sampler.accept(token)
        return sampler

    def _grammar(self, wanted: AnswerGrammar) -> Grammar | None:
        if wanted.lark:
            return self._guides.guide(wanted.lark)
        return llama.Gbnf(self._model, wanted.gbnf) if wanted.gbnf else None

    def _place(self, key: bytes, tokens: list[int], adapter: Adapter | None) -> int:
        """Take a slot. Returns how many of the tokens are in the cache already."""
        placed = self.batcher.place(key, tokens, adapter.name if adapter else "")
        assert placed is not None, "there was a free slot a moment ago"
        if placed.copy_from is None:
            usable = self._decoder.cut(placed.slot, placed.cached)
        else:
            usable = self._decoder.copy(placed.copy_from, placed.slot, placed.cached)
        if not usable:
            self.batcher.restart(key)
            return 0
        return placed.cached

    # One step.

    def _decode(self, plan: Plan) -> list[Logits]:
        """The logits of each output of the plan, valid until the next step."""
        began = time.perf_counter()
        wanted, found = {row for row, _ in plan.outputs}, dict[int, Logits]()
        groups = self.batcher.groups(plan, self._adapter_in_use)
        for adapter, rows in groups:
            self._decoder.use(self._adapters[adapter])
            self._adapter_in_use = adapter
            outputs = [at for at, row in enumerate(rows) if row in wanted]
            columns = plan.tokens, plan.positions, plan.slots
            tokens, positions, slots = ([column[row] for row in rows] for column in columns)
            logits = self._decoder.decode(tokens, positions, slots, outputs)
            if rows is not groups[-1][1]:
                logits = logits.copy()  # the next call overwrites them
            found |= zip([rows[at] for at in outputs], logits, strict=True)
        self.batcher.done(plan, (time.perf_counter() - began) * 1000)
        return [found[row] for row, _ in plan.outputs]

    def _advance(self, stream: Stream, logits: Logits) -> Output:
        """Choose the next token, and release text that may be sent."""
        stream.first = stream.first or time.perf_counter()
        try:
            token = stream.sampler.choose(logits, stream.index)
        except DeadEnd:
            text = "no token can follow: grammar and biases exclude each other"
            return self._end(stream, "error", [], [], ErrorInfo(Code.BAD_REQUEST, text))
        if self._model.ends(token):
            return self._end(stream, "stop", *stream.gate.flush())
        stream.index += 1
        if stream.top is not None:
            stream.logprobs.append(logprob_of(logits, token, stream.top, self._model.piece))
        ids, pieces, stopped = stream.gate.push(token, self._model.piece(token))
        if stopped:
            return self._end(stream, "stop", ids, pieces)
        if stream.index >= stream.limit:
            more, more_pieces = stream.gate.flush()
            return self._end(stream, "length", ids + more, pieces + more_pieces)
        self.batcher.push(stream.key, token)
        return Output(stream.key, ids, pieces, logprobs=stream.take_logprobs(len(ids)))

    def _end(
        self, stream: Stream, reason: Reason, ids: list[int], pieces: list[bytes], error: ErrorInfo | None = None
    ) -> Output:
        del self._streams[stream.key]
        self.batcher.finish(stream.key)
        now = time.perf_counter()
        first = stream.first or now
        cached = min(stream.cached_tokens, stream.prompt_tokens)  # of an answer that goes on, tokens of it are as well
        usage = Usage(stream.prompt_tokens, cached, (first - stream.started) * 1000, (now - first) * 1000)
        return Output(
            stream.key,
            ids,
            pieces,
            end=reason,
            usage=usage,
            error=error,
            logprobs=stream.take_logprobs(len(ids)),
            stop=stream.gate.stop_string,
        )

    def _test(self, adapter: Adapter | None) -> None:
        """Decode a prompt of several tokens. If that crashes, it is while loading and not in a request."""
        key = bytes(limits.RUN_KEY_BYTES)
        if self._template is not None:
            self._template.render([{"role": "user", "content": "Hello"}])
        # A vocabulary of bytes has a token for each character; the text has to fit the smallest context.
        text = SELF_TEST[: self._decoder.context // 2 - SELF_TEST_TOKENS]
        model = with_adapter(self._setup.name, adapter.name) if adapter else ""
        refused = self.start(Start(key, text, max_tokens=SELF_TEST_TOKENS, seed=1, model=model), 0)
        if refused is not None:
            raise llama.LoadError(f"the self-test was refused: {refused.error.text}")
        while self._streams and (plan := self.batcher.plan()):
            for logits in self._decode(plan):
                if adapter is not None and not np.isfinite(logits).all():
                    # Its slot would have cells that are no numbers, which spoil whatever uses them next.
                    raise llama.LoadError(f"the adapter {adapter.path} computes what is not a number: it is damaged")
                self._advance(self._streams[key], logits)


def _refused(start: Start, code: Code, text: str) -> Refused:
    return Refused(start.key, ErrorInfo(code, text), final=True)


def not_for(setup: Setup, task: Task) -> ErrorInfo:
    """A broker of this version does not ask for it; an older one knows no kinds of models."""
    text = f"{setup.name} is a model of the kind {setup.purpose.kind!r}, which does not do {task!r}"
    return ErrorInfo(Code.BAD_REQUEST, text, hint="`llambo models` lists the models and their kinds")
