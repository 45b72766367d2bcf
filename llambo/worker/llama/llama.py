"""llama.cpp, as much of it as the engine needs: the functions of `c_api.py`, called with our parameters.

    Model       weights and vocabulary: tokens of a text, text of a token, metadata
    Decoder     a context with a separate cache for each slot; one call decodes one step of all of them
    Candidates  the native part of sampling, for one request
    Gbnf        a grammar, for one request

What was learnt the hard way:
- A ctypes callback without a Python reference is collected, and the next call of it is a segmentation fault.
- Filling a batch field by field through ctypes costs more than sampling does. The batch here consists of numpy
  arrays, and llama.cpp gets their addresses.
- A C++ exception that reaches Python ends the process. So a grammar must never accept a token it has not allowed.
- With `use_extra_bufts` llama.cpp may choose instructions (AMX) that a hypervisor forbids. Then the first prompt of
  more than one token ends the process. The agent starts the next engine with `safe`, which turns them off.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llambo.mesh.wire import conversation
from llambo.mesh.wire.messages import Sampling
from llambo.worker.llama import binding, c_api
from llambo.worker.llama.llama_log import LlamaLog
from llambo.worker.llama.offload import Offload
from llambo.worker.llama.sampling import Grammar, Ids, Logits
from llambo.worker.models.model_files import Layout
from llambo.worker.models.placement import CPU, Placement

#: The functions of llama.cpp, once `open_library` has loaded it. A process has one library.
lib: Any = None

KV_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2, "f32": 0, "bf16": 30}
FLASH = {"auto": -1, "off": 0, "on": 1}
#: Text that ends a repetition for DRY, as in llama.cpp.
DRY_BREAKERS = (b"\n", b":", b'"', b"*")
#: A token whose logit is this far below the best is hardly ever among the likeliest k.
NEAR = np.float32(12)
#: A grammar is asked about this many of the likeliest tokens, and about more only if they are not enough.
LIKELIEST = (64, 1024)
#: The longest text of one token.
PIECE_BYTES = 4096
#: From llama.h: neither mapped nor locked.
LOAD_PLAIN = 0

_TAGS = frozenset([conversation.CALL_BEGIN.encode(), conversation.CALL_END.encode()])

_CANDIDATES = ctypes.POINTER(c_api.TokenData)
CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class LoadError(Exception):
    """The model cannot be served; the text gives the reason, for people."""


class NoMemory(LoadError):
    """There is not enough memory for it."""


def open_library(configured: str = "") -> binding.Library:
    """Load it, once. Raises LibraryError. `configured`: the setting `llama_lib`."""
    global lib  # noqa: PLW0603  # two builds of llama.cpp in one process would share symbols
    if lib is None:
        lib = binding.load(binding.find(configured))
    library: binding.Library = lib
    if configured and binding.find(configured) != library.file:
        text = f"this process has loaded {library.file.path} already"
        raise binding.LibraryError("not loaded", text, "a process uses one library")
    return library


_log: LlamaLog | None = None
#: These references have to live as long as the process.
_callbacks: list[Any] = []


def start_library() -> LlamaLog:
    global _log  # noqa: PLW0603  # the library has one log per process as well
    open_library()
    if _log is None:
        _log = LlamaLog()
        _callbacks.append(c_api.LogCallback(_log.on_line))
        lib.llama_log_set(_callbacks[0], ctypes.c_void_p(0))
        lib.llama_backend_init()
    _log.lines.clear()
    return _log


class Model:
    """`dry`: nothing is allocated, and the model cannot compute."""

    def __init__(
        self, path: str, placement: Placement = CPU, *, safe: bool = False, dry: bool = False,
        on_progress: Callable[[float], None] = lambda share: None,
    ) -> None:  # fmt: skip
        def go_on(share: float, _: Any) -> bool:
            on_progress(share)
            return True

        log = start_library()
        params = lib.llama_model_default_params()
        self._offload = Offload(lib, placement)
        self._offload.set(params)
        params.use_extra_bufts = not safe
        if dry:
            params.no_alloc, params.load_mode = True, LOAD_PLAIN
        callback = c_api.ProgressCallback(go_on)
        params.progress_callback = callback
        self.handle = lib.llama_model_load_from_file(os.fsencode(path), params)
        del callback
        if not self.handle:
            raise LoadError(f"{path} cannot be loaded: {log.reason()}")
        self.vocab = lib.llama_model_get_vocab(self.handle)
        self.tokens = int(lib.llama_vocab_n_tokens(self.vocab))
        self.trained_context = int(lib.llama_model_n_ctx_train(self.handle))
        self.embedding_size = int(lib.llama_model_n_embd_out(self.handle))
        self._pieces: dict[int, bytes] = {}
        self._buffer = ctypes.create_string_buffer(PIECE_BYTES)
        if lib.llama_model_has_encoder(self.handle) or not lib.llama_model_has_decoder(self.handle):
            raise LoadError(f"{path} is not a model that generates text")
        if self.tokens == 0:
            raise LoadError(f"{path} has no vocabulary")
        self.endings = [token for token in range(self.tokens) if lib.llama_vocab_is_eog(self.vocab, token)]
        self._endings = frozenset(self.endings)

    def load_adapter(self, path: str) -> int:
        """Its address. It lives as long as the model."""
        log = start_library()
        handle = lib.llama_adapter_lora_init(self.handle, os.fsencode(path))
        if not handle:
            raise LoadError(f"the adapter {path} cannot be loaded: {log.reason()}")
        return int(handle)

    @property
    def parameters(self) -> int:
        return int(lib.llama_model_n_params(self.handle))

    @property
    def layers(self) -> int:
        return int(lib.llama_model_n_layer(self.handle))

    def metadata(self, key: str) -> str:
        """One entry of the model's metadata; empty if there is none."""
        size = 1024
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, size)
            if length < size:
                return buffer.value.decode(errors="replace") if length >= 0 else ""
            size = length + 1

    def describe(self) -> str:
        """`llama 135M Q4_1`. llama.cpp guesses the size, its second word, from the layers."""
        buffer = ctypes.create_string_buffer(256)
        lib.llama_model_desc(self.handle, buffer, 256)
        architecture, _, quantisation = (*buffer.value.decode(errors="replace").split(" ", 2), "", "")[:3]
        number, unit = (self.parameters / 1e9, "B") if self.parameters >= 1e9 else (self.parameters / 1e6, "M")
        return f"{architecture} {number:.3g}{unit} {quantisation}".rstrip()

    def tokenize(self, text: bytes, *, special: bool, framed: bool = True) -> list[int]:
        """`special`: names of control tokens in the text become those tokens, which a chat template needs.

        `framed`: with the tokens that the vocabulary wants around a text.
        """
        count = -(len(text) + 8)
        while count < 0:  # more than there was room for
            buffer = (ctypes.c_int32 * -count)()
            count = lib.llama_tokenize(self.vocab, text, len(text), buffer, -count, framed, special)
        return list(buffer[:count])

    def piece(self, token: int) -> bytes:
        """The bytes a token adds to the text. Control tokens add none, except for the tags around a tool call."""
        found = self._pieces.get(token)
        if found is None:
            found = self._render(token, special=False)
            if not found and (name := self._render(token, special=True)) in _TAGS:
                found = name
            self._pieces[token] = found
        return found

    def piece_or_name(self, token: int) -> bytes:
        """The bytes of a token; for a control token its name."""
        return self._render(token, special=True)

    def name(self, token: int) -> str:
        """The text of a control token in a template, for example `<s>`."""
        return self._render(token, special=True).decode(errors="replace") if token >= 0 else ""

    @cached_property
    def longest_piece_bytes(self) -> int:
        """Of all tokens, control tokens by their names."""
        return max(len(self._render(token, special=True)) for token in range(self.tokens)) or 1

    @property
    def bos(self) -> str:
        return self.name(int(lib.llama_vocab_bos(self.vocab)))

    @property
    def eos(self) -> str:
        return self.name(int(lib.llama_vocab_eos(self.vocab)))

    def ends(self, token: int) -> bool:
        return token in self._endings

    def _render(self, token: int, *, special: bool) -> bytes:
        size = lib.llama_token_to_piece(self.vocab, token, self._buffer, PIECE_BYTES, 0, special)
        return self._buffer.raw[:size] if size > 0 else b""


class LlamaContext:
    """Sequences of tokens with their cells, and one batch for all steps. `params` are those of llama.cpp."""

    def __init__(self, model: Model, layout: Layout, what: str, batch: int, **params: Any) -> None:
        log = start_library()
        settings = lib.llama_context_default_params()
        settings.n_batch = settings.n_ubatch = batch
        settings.n_threads = settings.n_threads_batch = layout.threads
        settings.type_k = settings.type_v = KV_TYPES[layout.kv_type]
        settings.flash_attn_type = FLASH[layout.flash_attn]
        settings.offload_kqv = settings.no_perf = True
        for name, value in params.items():
            setattr(settings, name, value)
        self.handle = lib.llama_init_from_model(model.handle, settings)
        if not self.handle:
            raise NoMemory(f"no context of {what}: {log.reason()}")
        self._memory = lib.llama_get_memory(self.handle)
        self._make_batch(batch)

    def _make_batch(self, size: int) -> None:
        self._tokens = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._sequences = np.zeros(size, np.int32)
        self._counts = np.ones(size, np.int32)
        self._wanted = np.zeros(size, np.int8)
        # Each row refers to its sequences by address. Here each row has one, and all are in one array.
        self._addresses = self._sequences.ctypes.data + 4 * np.arange(size, dtype=np.uint64)
        kinds = {name: kind for name, kind, *_ in c_api.LlamaBatch._fields_}

        def pointer(array: NDArray[Any], name: str) -> Any:
            kind: Any = kinds[name]
            return ctypes.cast(array.ctypes.data, kind)

        self._batch = c_api.LlamaBatch(
            n_tokens=0,
            token=pointer(self._tokens, "token"),
            embd=None,
            pos=pointer(self._positions, "pos"),
            n_seq_id=pointer(self._counts, "n_seq_id"),
            seq_id=pointer(self._addresses, "seq_id"),
            logits=pointer(self._wanted, "logits"),
        )

    def _step(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        outputs: Sequence[int] | slice,
    ) -> None:
        """Decode these rows. `outputs`: the rows whose output is wanted."""
        count = len(tokens)
        self._tokens[:count] = tokens
        self._positions[:count] = positions
        self._sequences[:count] = sequences
        self._wanted[:count] = 0
        self._wanted[outputs] = 1
        self._batch.n_tokens = count
        code = lib.llama_decode(self.handle, self._batch)
        if code != 0:
            raise RuntimeError(f"llama_decode gave {code} for a step of {count} tokens")

    def cut(self, slot: int, cells: int) -> bool:
        """Keep only the first cells of a slot. False: this kind of cache cannot be cut, and the slot is empty now."""
        if not self._memory or lib.llama_memory_seq_rm(self._memory, slot, cells, -1):
            return True  # (an encoder has no cache)
        lib.llama_memory_seq_rm(self._memory, slot, -1, -1)
        return False


class Decoder(LlamaContext):
    """The context of answers: each slot has cells of its own."""

    def __init__(self, model: Model, layout: Layout) -> None:
        slots, context = layout.slots, layout.context
        #: The most tokens in a step. llama.cpp aborts on a step of more than the context that was asked for.
        self.rows = min(layout.batch, slots * context)
        # A cache for each sequence was measured to be faster than one for all.
        super().__init__(
            model, layout, f"{slots} x {context} tokens", self.rows,
            n_ctx=slots * context, n_seq_max=slots, n_outputs_max=slots, kv_unified=False,
        )  # fmt: skip
        self._vocab = model.tokens
        self.context = int(lib.llama_n_ctx_seq(self.handle))
        self._adapter = 0

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int], outputs: Sequence[int]
    ) -> NDArray[np.float32]:
        """One step. Returns a row of logits for each row of `outputs`, in that order, valid until the next step."""
        self._step(tokens, positions, slots, outputs)
        if not outputs:
            return np.empty((0, self._vocab), np.float32)
        # llama.cpp returns them in the order of the batch, and `outputs` is sorted.
        logits = lib.llama_get_logits(self.handle)
        return np.ctypeslib.as_array(logits, shape=(len(outputs), self._vocab))

    def use(self, adapter: int) -> None:
        """For the steps that follow; 0: none. Each change costs about as much as a step of a very small model."""
        if adapter != self._adapter:
            handles, scales = (ctypes.c_void_p * 1)(adapter), (ctypes.c_float * 1)(1.0)
            code = lib.llama_set_adapters_lora(self.handle, handles, 1 if adapter else 0, scales)
            if code != 0:
                raise RuntimeError(f"llama_set_adapters_lora gave {code}")
            self._adapter = adapter

    def copy(self, source: int, slot: int, cells: int) -> bool:
        """Copy the first cells of another slot. Between caches only all cells can be copied, then the copy is cut."""
        lib.llama_memory_seq_rm(self._memory, slot, -1, -1)
        lib.llama_memory_seq_cp(self._memory, source, slot, -1, -1)
        return self.cut(slot, cells)

    def cells(self, slot: int) -> int:
        return int(lib.llama_memory_seq_pos_max(self._memory, slot)) + 1


class Gbnf:
    """A grammar with its state in one answer."""

    def __init__(self, model: Model, text: str) -> None:
        log = start_library()
        self._handle = lib.llama_sampler_init_grammar(model.vocab, text.encode(), b"root")
        if not self._handle:
            raise ValueError(f"the grammar cannot be parsed: {log.reason()}")
        self._one = np.zeros(1, CANDIDATE)

    def __del__(self) -> None:
        handle, self._handle = getattr(self, "_handle", None), None
        if handle:
            lib.llama_sampler_free(handle)

    def allows(self, token: int) -> bool:
        self._one[0] = (token, 0.0, 0.0)
        self.apply(_array(self._one))
        return bool(np.isfinite(self._one["logit"][0]))

    def accept(self, token: int) -> None:
        if not self.allows(token):
            raise ValueError("the grammar refuses this token")
        lib.llama_sampler_accept(self._handle, token)

    def apply(self, candidates: Any) -> None:
        lib.llama_sampler_apply(self._handle, ctypes.byref(candidates))


class Candidates:
    """The parts of sampling that walk or sort the whole vocabulary. `shared` is one array for all requests."""

    def __init__(self, model: Model, options: Sampling, shared: NDArray[Any], history: Sequence[int]) -> None:
        self._shared = shared
        self._dry = options.dry_multiplier > 0
        #: The top-k that is first in the chain, or 0.
        self._top_k = 0 if self._dry or options.mirostat else options.top_k
        #: Tokens with a logit this far below the best allowed one need not be found: min-p would drop them anyway.
        self._reach = NEAR
        if options.min_p > 0 and not options.mirostat:
            self._reach = min(NEAR, np.float32(2 - math.log(options.min_p)))
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for sampler in self._samplers(model, options):
            lib.llama_sampler_chain_add(self._chain, sampler)
        for token in history if self._dry else ():
            self.accept(token)

    def __del__(self) -> None:
        chain, self._chain = getattr(self, "_chain", None), None
        if chain:
            lib.llama_sampler_free(chain)

    def _samplers(self, model: Model, options: Sampling) -> list[Any]:
        samplers = []
        if self._dry:
            breakers = (ctypes.c_char_p * len(DRY_BREAKERS))(*DRY_BREAKERS)
            samplers.append(
                lib.llama_sampler_init_dry(
                    model.vocab,
                    options.dry_multiplier,
                    options.dry_base,
                    options.dry_allowed_length,
                    options.dry_penalty_last_n,
                    breakers,
                    len(DRY_BREAKERS),
                )
            )
        if options.mirostat:
            return samplers  # mirostat replaces the samplers below
        if options.top_k:
            samplers.append(lib.llama_sampler_init_top_k(options.top_k))
        if options.typical_p < 1:
            samplers.append(lib.llama_sampler_init_typical(options.typical_p, 1))
        if options.top_p < 1:
            samplers.append(lib.llama_sampler_init_top_p(options.top_p, 1))
        if options.min_p > 0:
            samplers.append(lib.llama_sampler_init_min_p(options.min_p, 1))
        return samplers

    def narrow(self, logits: Logits, grammar: Grammar | None) -> tuple[Ids, Logits]:
        if grammar is not None:
            array = self._allowed(logits, grammar, self._top_k)
        else:
            array = self._near_best(logits) if self._top_k else self._fill(logits)
        lib.llama_sampler_apply(self._chain, ctypes.byref(array))
        return _columns(array)

    def mask(self, logits: Logits, grammar: Grammar) -> tuple[Ids, Logits]:
        return _columns(self._allowed(logits, grammar, 1))

    def accept(self, token: int) -> None:
        if self._dry:
            lib.llama_sampler_accept(self._chain, token)

    def _allowed(self, logits: Logits, grammar: Grammar, enough: int) -> Any:
        """Tokens that the grammar allows. Asking it about the whole vocabulary takes as long as many steps.

        So only the likeliest are asked about, if `enough` of them are allowed (as many as a top-k would leave), or if
        all tokens near the best allowed one are among them.
        """
        for size in LIKELIEST if not self._dry else ():
            if size >= len(logits):
                break
            near = np.argpartition(logits, -size)[-size:]
            candidates = self._shared[:size]
            candidates["id"] = near
            candidates["logit"] = logits[near]
            least = candidates["logit"].min()
            array = _array(candidates)
            grammar.apply(array)
            passed = candidates["logit"][np.isfinite(candidates["logit"])]
            if len(passed) and (0 < enough <= len(passed) or least < passed.max() - self._reach):
                return array
        array = self._fill(logits)
        grammar.apply(array)
        return array

    def _near_best(self, logits: Logits) -> Any:
        """Candidates for a top-k without copying the whole vocabulary: those near the best, if they are at least k.

        All others are below all of these, so the chain leaves the same tokens.
        """
        near = np.flatnonzero(logits > logits.max() - NEAR)
        if len(near) < self._top_k:
            return self._fill(logits)
        candidates = self._shared[: len(near)]
        candidates["id"] = near
        candidates["logit"] = logits[near]
        return _array(candidates)

    def _fill(self, logits: Logits) -> Any:
        self._shared["id"] = _numbers(len(logits))
        self._shared["logit"] = logits
        return _array(self._shared)


_ids: dict[int, Ids] = {}


def _numbers(count: int) -> Ids:
    if count not in _ids:
        _ids[count] = np.arange(count, dtype=np.int32)
    return _ids[count]


def shared_candidates(model: Model) -> NDArray[Any]:
    return np.zeros(model.tokens, CANDIDATE)


def _array(candidates: NDArray[Any]) -> Any:
    data = ctypes.cast(candidates.ctypes.data, _CANDIDATES)
    return c_api.TokenDataArray(data=data, size=len(candidates), selected=-1, sorted=False)


def _columns(array: Any) -> tuple[Ids, Logits]:
    left = view_of(array)
    return left["id"].copy(), left["logit"].copy()


def view_of(array: Any) -> NDArray[Any]:
    """A sampler may have moved its result, so the address in the array has to be read."""
    address = ctypes.cast(array.data, ctypes.c_void_p).value
    assert address is not None
    raw = (ctypes.c_char * (array.size * CANDIDATE.itemsize)).from_address(address)
    return np.frombuffer(raw, CANDIDATE)
