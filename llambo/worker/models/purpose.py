"""What a model is for, by the header of its file: it generates text, embeds texts, or reranks documents.

`ARCHITECTURE.pooling_type` says how the vectors of the tokens of a text become one. Files of models that generate do
not have it, those of embedding models and rerankers do, and encoders are good for nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from llambo.mesh.wire.messages import Kind
from llambo.worker.models.gguf import ModelFile

#: By their number in the file and in llama.cpp.
POOLINGS = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}
#: Architectures in which each token sees the whole text: llama.cpp computes a text in one step, and caches nothing.
ENCODERS = frozenset({
    "bert", "nomic-bert", "nomic-bert-moe", "modern-bert", "neo-bert", "jina-bert-v2", "jina-bert-v3", "eurobert",
    "gemma-embedding",
})  # fmt: skip
#: Architectures whose rerankers answer yes or no, with a softmax over both: their scores are from 0 to 1 already.
YES_OR_NO = frozenset({"qwen3", "qwen3vl"})
#: The prompt of a reranker, with `{query}` and `{document}`.
RERANK_TEMPLATE = "tokenizer.chat_template.rerank"


@dataclass(frozen=True, slots=True)
class Purpose:
    kind: Kind = "generate"
    #: How the file wants texts to be pooled; a model that generates, or has no pooling: the mean.
    pooling: str = "mean"
    #: The file says so itself.
    is_pooled: bool = False
    #: It has no cache of keys and values.
    is_encoder: bool = False
    #: A text has to be computed in one step.
    whole: bool = False
    #: A reranker whose scores are from 0 to 1 as they are.
    yes_or_no: bool = False
    #: Why it cannot do what it is for; empty: it can.
    problem: str = ""


def purpose_of(file: ModelFile) -> Purpose:
    encoder = file.architecture in ENCODERS
    number = file.number("pooling_type", 0)
    pooling = POOLINGS.get(number, "")
    pooled = pooling not in ("", "none")
    if not pooled and not encoder:
        return Purpose()
    if pooling == "rank":
        causal = not encoder and file.meta.get(f"{file.architecture}.attention.causal") is not False
        yes_or_no = file.architecture in YES_OR_NO
        return Purpose("rerank", pooling, True, encoder, not causal, yes_or_no, _rerank_problem(file, yes_or_no))
    problem = "" if pooling else f"an embedding model whose pooling, number {number}, is not known"
    # Only the last token of a text that is computed in several steps has seen all of it.
    causal = not encoder and file.meta.get(f"{file.architecture}.attention.causal") is not False
    whole = not (causal and pooling == "last")
    return Purpose("embed", pooling if pooled else "mean", pooled, encoder, whole, problem=problem)


def _rerank_problem(file: ModelFile, yes_or_no: bool) -> str:
    names = {name for name, _ in file.tensor_sizes}
    if yes_or_no and not file.meta.get(RERANK_TEMPLATE):
        return (
            f"a {file.architecture} reranker without a prompt (`{RERANK_TEMPLATE}`): its scores would mean nothing; "
            "get a newer file of it, or convert it again with a newer llama.cpp"
        )
    if not names & {"cls.weight", "cls.output.weight"}:
        return "a reranker without a classifier (`cls.output.weight`): it has no scores; convert it again"
    labels = file.meta.get(f"{file.architecture}.classifier.output_labels")
    if isinstance(labels, list) and len(labels) > 1 and not yes_or_no:
        listed = ", ".join(map(str, labels[:5]))
        return f"a classifier with {len(labels)} classes ({listed}), and none of them is a score for a document"
    return ""
