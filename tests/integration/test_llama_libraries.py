"""Each library of llama.cpp that is installed: the same engine, the same tokens, and answers that move between them.

Tests of the engine run in a process of their own for each library but the one that the other tests use.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import tiny_model
from llambo import Client
from llambo.mesh.client.client import Answer, Options
from llambo.testing.mesh import Mesh
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import LlamaOptions, WorkerConfig
from llambo.worker.llama import binding
from llambo.worker.llama.binding import LibraryFile

HERE = Path(__file__).resolve().parent
LIBRARIES = binding.installed()
LLAMA = LlamaOptions(slots=4, context=512, threads=1, batch=128)
#: Each token of these answers is far likelier than the next one. Elsewhere builds differ: they add up in another order,
#: and the weights of SmolLM2 have four bits.
PROMPTS = (
    "Count from 1 to 10.",
    "Repeat after me: one two three four five six seven eight nine ten.",
    "Count from 1 to 20, separated by commas.",
)
TOKENS = 32
#: What calls each function of the library. Left out are tests of what is made of it, and those that take longest.
FILES = ("test_llama_engine.py", "test_llama_grammar.py", "test_llama_candidates.py", "test_llama_tasks.py",
         "test_llama_pooled.py")  # fmt: skip
LEFT_OUT = (
    "stopped_anywhere", "share_their_steps", "last_cell", "second_turn", "sampling1", "penalties", "seeded", "stop",
    "same_seed", "system_message", "defaults", "do_not_change", "do_not_know", "cancel", "embeddings_are_those",
)  # fmt: skip

both = pytest.mark.needs("two-libraries")


@pytest.mark.parametrize("file", LIBRARIES, ids=str)
def test_each_library_says_what_it_is_and_what_it_computes_with(file: LibraryFile) -> None:
    report = binding.examine(file.path)
    assert (report.problem, report.path, report.name) == ("", file.path, str(file))
    assert report.versions and report.system_info
    (cpu,) = [device for device in report.devices if device.kind == "cpu"]
    assert 0 < cpu.free_bytes <= cpu.total_bytes
    assert report.supports_gpu or not [device for device in report.devices if device.kind == "gpu"]


@both
@pytest.mark.parametrize("file", LIBRARIES, ids=str)
def test_a_library_that_is_taken_for_another_is_refused(file: LibraryFile) -> None:
    (other,) = [each for each in LIBRARIES if each != file]
    script = (
        "import sys; from llambo.worker.llama.binding import LibraryFile, load\n"
        "load(LibraryFile(*sys.argv[1:]))"
    )  # fmt: skip
    child = subprocess.run(
        [sys.executable, "-c", script, file.path, other.package, other.version],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert child.returncode == 1, child
    assert "LibraryError" in child.stderr and "llama_context_params" in child.stderr


@both
def test_the_engine_works_with_the_other_library_too() -> None:
    (file,) = LIBRARIES[1:]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    command += [*(str(HERE / name) for name in FILES), "-k", " and ".join(f"not {word}" for word in LEFT_OUT)]
    environment = {**os.environ, "LLAMBO_LLAMA_LIB": file.path}
    child = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert child.returncode == 0, child.stdout[-10_000:] + child.stderr
    assert " skipped" not in child.stdout and " passed" in child.stdout


#: Logits and embeddings of a model whose weights are not quantised.
NUMBERS = """
import sys, numpy as np
from llambo.worker.llama import llama
from llambo.worker.llama.embedder import Embedder
from llambo.worker.models.model_files import Layout
from llambo.worker.models.purpose import Purpose
model_path, library, result = sys.argv[1:]
llama.open_library(library)
model = llama.Model(model_path, safe=True)
tokens = [(7 * at * at + 3 * at) % model.tokens for at in range(60)]
def layout(kv_type, flash_attn):
    return Layout(slots=2, context=256, batch=128, threads=1, kv_type=kv_type, flash_attn=flash_attn, need_bytes=0,
        free_bytes=0)
found = []
for kv_type in ("f32", "f16"):
    for flash_attn in ("off", "on"):
        decoder = llama.Decoder(model, layout(kv_type, flash_attn))
        rows = [*range(60), *range(20)], [0] * 60 + [1] * 20
        found.append(decoder.decode(tokens + tokens[:20], *rows, [59, 79]).copy())
embedder = Embedder(model, layout("f32", "off"), 256, Purpose())
found.append(embedder.embed(tokens, range(60), [0] * 60).copy())
np.savez(result, *found)
"""


@both
def test_without_quantisation_all_libraries_compute_the_same_numbers(tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    model.write_bytes(tiny_model.whole())
    found = []
    for number, file in enumerate(LIBRARIES):
        result = tmp_path / f"{number}.npz"
        command = [sys.executable, "-c", NUMBERS, str(model), file.path, str(result)]
        child = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        assert child.returncode == 0, child.stderr
        found.append(np.load(result))
    first, *others = found
    for other in others:
        for name in first:
            assert first[name].std() > 0.5
            assert np.allclose(first[name], other[name], atol=1e-3), name


# --- one mesh with a worker for each ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Mesh(0, worker=WorkerConfig(engine="llama", model="smollm2"), check=True) as mesh:
        for file in LIBRARIES:
            llama = replace(LLAMA, library=file.path)
            mesh.worker_config = replace(mesh.worker_config, llama=llama, node_class=file.package)
            mesh.spawn(file.package)
        for process in mesh.workers:
            process.first_line()
        yield mesh


def greedy(model: str, tokens: int = TOKENS) -> Options:
    return {"model": model, "form": "user", "temperature": 0.0, "max_tokens": tokens}


async def answers_of(client: Client, file: LibraryFile) -> list[Answer]:
    options = greedy(f"smollm2@{file.package}")
    return await asyncio.gather(*[client.generate(prompt, **options) for prompt in PROMPTS])


async def test_the_mesh_shows_which_library_each_worker_uses(mesh: Mesh) -> None:
    async with mesh.client() as client:
        shown = {row.worker: row.library for row in await client.workers()}
    assert shown == {file.package: str(file) for file in LIBRARIES}
    table = mesh.commands.ok("workers")
    assert all(str(file) in table.out for file in LIBRARIES)


@both
async def test_without_chance_all_libraries_give_the_same_tokens(mesh: Mesh) -> None:
    async with mesh.client() as client:
        first, *others = [await answers_of(client, file) for file in LIBRARIES]
    for other in others:
        assert [answer.ids for answer in other] == [answer.ids for answer in first]
    assert {len(answer.ids) for answer in first} >= {TOKENS}


@both
async def test_an_answer_moves_from_one_library_to_the_other(mesh: Mesh) -> None:
    prompt, options = PROMPTS[0], greedy("smollm2", 48)
    async with mesh.client() as client:
        whole = await client.generate(prompt, **options)
        for file in LIBRARIES:
            async with client.stream(prompt, **options) as stream:
                await stream.next_piece()
                (busy,) = [row.worker for row in await client.workers() if row.busy]
                await client.drain(busy, move=True)
                moved = await stream.result()
                await client.drain(busy, undo=True)
            assert (moved.ids, moved.reason) == (whole.ids, whole.reason), file
    assert mesh.counter("moved") >= 1
