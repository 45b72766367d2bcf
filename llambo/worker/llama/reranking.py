"""What a reranker reads, and what its output means.

It reads a query and one document in one text. A file may have a prompt for that, which llama.cpp's converter writes for
rerankers that were made of chat models. For all others the text is

    BOS query EOS SEP document EOS

without those of these tokens that the vocabulary does not want. One of BERT, which has no EOS, ends with SEP.
"""

from __future__ import annotations

import logging
import re

import numpy as np
from numpy.typing import NDArray

from llambo.worker.llama import llama
from llambo.worker.llama.llama import LoadError, Model
from llambo.worker.models.purpose import RERANK_TEMPLATE, Purpose

log = logging.getLogger("llambo.engine")

_NONE = -1
_PLACES = re.compile(r"\{query\}|\{document\}")


class PairPrompt:
    """Raises LoadError if the model has neither a prompt nor the tokens that go around both texts."""

    def __init__(self, model: Model, purpose: Purpose) -> None:
        self._model, self._yes_or_no = model, purpose.yes_or_no
        self._template = model.metadata(RERANK_TEMPLATE)
        if self._template:
            if missing := {"{query}", "{document}"} - set(_PLACES.findall(self._template)):
                raise LoadError(f"the prompt of this reranker has no {' and no '.join(sorted(missing))}")
            return
        lib, vocab = llama.lib, model.vocab
        bos, eos, sep = lib.llama_vocab_bos(vocab), lib.llama_vocab_eos(vocab), lib.llama_vocab_sep(vocab)
        if bos == _NONE or eos == sep == _NONE:
            what = "BOS token" if bos == _NONE else "EOS or SEP token"
            raise LoadError(
                f"this reranker has no {what} and no prompt (`{RERANK_TEMPLATE}`) to join query and document"
            )
        ends = [eos if eos != _NONE else sep] if lib.llama_vocab_get_add_eos(vocab) else []
        seps = [sep] if lib.llama_vocab_get_add_sep(vocab) and sep != _NONE else []
        self._begin = [bos] if lib.llama_vocab_get_add_bos(vocab) else []
        self._between = [*ends, *seps]
        self._end = ends or seps
        types = model.metadata("tokenizer.ggml.token_type_count")
        if types.isdecimal() and int(types) > 1:
            log.warning(
                "this reranker was trained with two types of tokens, for query and document; llama.cpp knows one, "
                "so its scores are less good than those of the original"
            )

    def tokens(self, query: str, document: str) -> list[int]:
        if self._template:
            texts = {"{query}": query, "{document}": document}
            whole = _PLACES.sub(lambda place: texts[place[0]], self._template)
            return self._model.tokenize(whole.encode(), special=True, framed=False)
        first, second = (
            self._model.tokenize(text.encode(), special=False, framed=False) for text in (query, document)
        )  # fmt: skip
        return [*self._begin, *first, *self._between, *second, *self._end]

    def scores(self, outputs: NDArray[np.float64], *, raw: bool) -> list[float]:
        """From 0 to 1, unless `raw`."""
        found = outputs if raw or self._yes_or_no else 1 / (1 + np.exp(-np.clip(outputs, -500, 500)))
        return [float(score) for score in found]
