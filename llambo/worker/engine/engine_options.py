"""What can be set on the fake engine, so that tests and demos can make a worker slow, sick or uneven."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Style = Literal["plain", "wander"]
LoadCrash = Literal["never", "careless", "always"]


@dataclass(frozen=True, slots=True)
class FakeKnobs:
    """The defaults are a healthy engine without any delay. Token counts are per engine process, over all sequences."""

    #: `plain`: every disturbed run can be compared with the truth. `wander`: a wrong continuation is visible.
    style: Style = "plain"
    #: Sequences at a time.
    slots: int = 4
    #: Milliseconds from the start of a sequence to its first token.
    ttft_ms: float = 0
    #: Pace of each sequence; 0 gives a chunk of every sequence in every step.
    tokens_per_s: float = 0
    #: Up to this many milliseconds more before each chunk, decided by a hash.
    jitter_ms: int = 0
    #: Tokens in a chunk: 1 to this many, decided by a hash.
    burst: int = 1
    #: Characters are cut across tokens now and then, as real tokenizers do.
    utf8_split: bool = False
    #: Mean length of an answer that ends by itself; 0: it runs to `max_tokens`.
    answer_tokens: int = 0
    #: The longest prompt + answer; 0: no limit.
    context_tokens: int = 0
    #: Numbers in an embedding.
    embedding_size: int = 8
    #: After this many tokens the process dies by a segmentation fault; 0: never.
    crash_at: int = 0
    #: After this many tokens the process lives on and does nothing; 0: never.
    hang_at: int = 0
    #: After this many tokens each chunk takes `slow_factor` times as long; 0: never.
    slow_at: int = 0
    slow_factor: float = 10.0
    #: How long its model takes to load.
    load_ms: int = 0
    #: The process dies while it loads: `careless` unless it was told to be careful, as where a machine lacks what a
    #: fast engine needs; or `always`.
    load_crash: LoadCrash = "never"
    #: It loads only if there is this file; empty: it needs none.
    load_file: str = ""
    #: A prompt with this text in it kills the process, at the same token whoever runs it; empty: none does.
    poison: str = ""


@dataclass(frozen=True, slots=True)
class LlamaKnobs:
    """How llama.cpp is to serve a model; 0 is for what suits the machine."""

    slots: int = 4
    #: Longest prompt + answer, in tokens, of each slot.
    context: int = 0
    threads: int = 0
    #: The most tokens in one step.
    batch: int = 512
    #: Layers computed by a GPU; -1: all.
    gpu_layers: int = 0
    kv_type: Literal["f16", "q8_0", "q4_0", "f32", "bf16"] = "f16"
    flash_attn: Literal["auto", "on", "off"] = "auto"
