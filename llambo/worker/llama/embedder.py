"""A context that makes vectors of texts, or scores of pairs of them, and no tokens.

    per token   the output of the last layer for each token, which the caller pools: of a model that generates, so that
                a long text can take several short steps beside answers
    pooled      one vector for each text, pooled by llama.cpp as the file of the model says, with what may follow that:
                dense layers, a classifier

A model is `whole` if a text has to be computed in one step: in an encoder each token sees those behind it, and a mean
needs all of them. Then the context has room for one text of its full length, and short texts share a step. A long text
takes seconds on a slow machine. So that its engine is not taken for one that hangs, llama.cpp calls `on_progress` after
each of the hundreds of parts of a step (those that the CPU computes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from llambo.worker.llama import c_api, llama
from llambo.worker.llama.llama import LlamaContext, Model
from llambo.worker.models.model_files import Layout
from llambo.worker.models.purpose import Purpose

#: Texts at a time, and tokens in a step. A row for each word of the vocabulary is computed or stored with each token.
SEQUENCES, ROWS = 16, 64
#: Texts at a time where each is computed in one step.
WHOLE_SEQUENCES = 64
#: From llama.h.
_NO_POOLING, _MEAN, _FROM_FILE = 0, 1, -1


class Embedder(LlamaContext):
    """All texts share `context` cells. `rows`: tokens of a step; a text of a `whole` model may have more."""

    def __init__(
        self, model: Model, layout: Layout, context: int, purpose: Purpose,
        on_progress: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        def go_on(_: object) -> bool:
            assert on_progress is not None
            on_progress()
            return False  # do not abort

        self.whole, self.pooled, self.pooling = purpose.whole, purpose.kind != "generate", purpose.pooling
        self.sequences = WHOLE_SEQUENCES if self.whole else SEQUENCES
        self.rows = min(layout.batch, context) if self.whole else ROWS
        pooling = _NO_POOLING if not self.pooled else _FROM_FILE if purpose.is_pooled else _MEAN
        #: Collected, the next call of it would be a segmentation fault.
        self._callback = c_api.AbortCallback(go_on) if on_progress is not None else c_api.AbortCallback()
        super().__init__(
            model, layout, f"{context} tokens for embeddings", context if self.whole else self.rows,
            n_ctx=context, n_seq_max=self.sequences, kv_unified=True, embeddings=True, pooling_type=pooling,
            abort_callback=self._callback,
        )  # fmt: skip
        #: Numbers of a row.
        self.size = int(llama.lib.llama_model_n_cls_out(model.handle)) if purpose.kind == "rerank" else (
            model.embedding_size
        )  # fmt: skip
        self.context = context

    def embed(self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]) -> NDArray[np.float32]:
        """One step. Returns a row for each token, in the same order, valid until the next step.

        If it is `pooled`: a row for each sequence, in the order of their first tokens. It is that of the whole text
        once the step had its last token.
        """
        self._step(tokens, positions, sequences, slice(len(tokens)))
        if not self.pooled:
            rows = llama.lib.llama_get_embeddings(self.handle)
            return np.ctypeslib.as_array(rows, shape=(len(tokens), self.size))
        found = [llama.lib.llama_get_embeddings_seq(self.handle, each) for each in dict.fromkeys(sequences)]
        if not all(found):
            missing = sum(not row for row in found)
            raise RuntimeError(f"llama.cpp made no vector for {missing} of {len(found)} texts")
        return np.stack([np.ctypeslib.as_array(row, shape=(self.size,)) for row in found])
