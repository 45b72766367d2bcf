"""Options for the engine: the part of a request that the broker passes on unread."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from llambo.mesh.wire import limits

Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-100.0, le=100.0)]
#: The last so many tokens; -1: all.
Window = Annotated[int, Meta(ge=-1, le=limits.MAX_TOKENS)]


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """Options for the engine. The broker never reads them; the worker refuses what it cannot do.

    The defaults, save for those that change nothing, are those of llama.cpp. A model may have others in its file; they
    hold for what a request leaves out. The fake engine knows `stop` only.
    """

    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.8
    stop: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=limits.STOP_CHARS)]],
        Meta(max_length=limits.STOP_STRINGS),
    ] = []
    #: What the prompt is: `text` goes to the model as it is; `user` is what a person says, and is put into the
    #: model's chat template if it has one; `messages` is a JSON list of messages, likewise, and `chat` a JSON object
    #: with `messages` and `tools`.
    form: Literal["text", "user", "messages", "chat"] = "text"
    #: With `user`: the message that tells the model how to behave.
    system: Annotated[str, Meta(max_length=limits.SYSTEM_CHARS)] = ""
    #: Only the likeliest k; 0: all.
    top_k: Annotated[int, Meta(ge=0, le=2**20)] = 40
    top_p: Share = 0.95
    min_p: Share = 0.05
    typical_p: Share = 1.0
    repeat_penalty: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    penalty_last_n: Window = 64
    #: 0: no DRY.
    dry_multiplier: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.0
    dry_base: Annotated[float, Meta(ge=1.0, le=100.0)] = 1.75
    dry_allowed_length: Annotated[int, Meta(ge=1, le=4096)] = 2
    dry_penalty_last_n: Window = -1
    xtc_probability: Share = 0.0
    xtc_threshold: Share = 0.1
    #: 2: mirostat version 2. It cannot be replayed exactly when an answer moves.
    mirostat: Literal[0, 2] = 0
    mirostat_tau: Annotated[float, Meta(ge=0.0, le=100.0)] = 5.0
    mirostat_eta: Share = 0.1
    #: Token id to what is added to its logit.
    logit_bias: Annotated[
        dict[Annotated[int, Meta(ge=0, le=2**31 - 1)], Annotated[float, Meta(ge=-1e4, le=1e4)]],
        Meta(max_length=limits.LOGIT_BIASES),
    ] = {}
    #: Never end before `max_tokens`.
    ignore_eos: bool = False
    #: `max_tokens` is as much as there may be, not what there must be room for: the context decides.
    fit: bool = False
    #: GBNF, or a JSON schema as JSON text: at most one of them.
    grammar: Annotated[str, Meta(max_length=limits.GRAMMAR_CHARS)] = ""
    json_schema: Annotated[str, Meta(max_length=limits.GRAMMAR_CHARS)] = ""
    #: With `chat`, whether the model may call its tools, in the form of `llambo.mesh.wire.naming` and with arguments
    #: that their schemas allow. `none`: it is not seen to; `auto`: it may; `required`: it does nothing else.
    tool_choice: Literal["none", "auto", "required"] = "none"
    #: Only these; empty: any of them.
    tool_names: Annotated[list[str], Meta(max_length=limits.TOOLS)] = []
    #: More than one call in an answer, one behind the other. Left out: if the model was made for calls; others tend to
    #: repeat them.
    parallel_tool_calls: bool | None = None
