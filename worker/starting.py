"""From a dispatch to the order for the engine: what the broker passed on unread is read here."""

from __future__ import annotations

import msgspec

from llambo.mesh import messages as m
from llambo.mesh.tasks import TaskOptions
from llambo.worker.engine_proto import Start

_decode_sampling = msgspec.msgpack.Decoder(m.Sampling).decode
_decode_options = msgspec.msgpack.Decoder(TaskOptions).decode
_decode_names = msgspec.msgpack.Decoder(dict[str, msgspec.Raw]).decode


def start_of(dispatch: m.Dispatch, prompt: bytes) -> Start:
    """Raises what a decoder raises."""
    key, generates = dispatch.id + dispatch.dispatch, dispatch.task == "generate"
    return Start(
        key,
        prompt,
        dispatch.max_tokens,
        dispatch.seed,
        dispatch.prefix,
        _decode_sampling(dispatch.sampling) if generates else m.Sampling(),
        dispatch.deadline_ms,
        dispatch.model,
        dispatch.logprobs,
        list(_decode_names(dispatch.sampling)),
        dispatch.task,
        TaskOptions() if generates else _decode_options(dispatch.sampling),
    )
