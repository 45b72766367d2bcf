"""llambo on a software GPU: devices, placement, answers, refusals.

    python -m tests.gpu.lavapipe                       with llama.cpp from .venv-gpu; it is compiled first if need be
    python -m tests.gpu.lavapipe --library FILE        with another libllama.so that has the backend Vulkan
    python -m tests.gpu.lavapipe --prompts 20

Mesa's lavapipe is a Vulkan device that computes on the CPU. It is slow, and exercises all that a card does: listing,
dry run, offload, answers. llama.cpp leaves such a device out unless GGML_VK_VISIBLE_DEVICES names it. With a real card,
`--card` leaves that variable alone.

Compiling takes a long time (half an hour on two cores), so this is not part of `make test`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from llambo.mesh.service import host
from llambo.testing.commands import LLAMBO, ROOT, WORKER
from llambo.testing.mesh import Mesh
from llambo.testing.processes import Process
from llambo.worker.models.gpus import PACKAGE

VENV = ROOT / ".venv-gpu"
#: What compiling and running needs of Debian.
DEBIAN = "cmake g++ glslc libvulkan-dev mesa-vulkan-drivers spirv-headers vulkan-tools"
#: Vulkan's headers must be as new as this: llama.cpp uses VK_EXT_layer_settings.
HEADERS = (1, 3, 272)
#: A device that computes on CPU cores is slow to begin with.
READY_S, ANSWER_S, STALL_MS = 600.0, 1200.0, "300000"
TOKENS = 16
SUBJECTS = (
    "gravity", "Rome", "bread", "the sea", "a violin", "snow", "iron", "the moon", "a bee", "paper", "tea", "a clock",
    "salt", "a bridge", "the wind", "glass", "a lion", "rice", "a mirror", "the sun",
)  # fmt: skip
CHECKS: list[str] = []


def check(what: str, holds: bool, shown: object = "") -> None:
    """Every check is printed. The first one that fails ends the script."""
    print(f"  {'ok  ' if holds else 'FAIL'} {what}{f': {shown}' if shown else ''}", flush=True)
    if not holds:
        raise SystemExit(1)
    CHECKS.append(what)


# --- the library ---


def built_library() -> Path:
    """The one in `.venv-gpu`, compiled if it is not there."""
    found = sorted(VENV.glob("lib/python*/site-packages/llama_cpp/lib/libllama.so"))
    if found:
        return found[0]
    if not shutil.which("glslc") or not _headers():
        wanted = ".".join(map(str, HEADERS))
        raise SystemExit(
            f"needed: apt install {DEBIAN}; Vulkan's headers must be {wanted} or newer (Debian 12 has older ones: "
            "see docs/gpu.md), or name a library with --library"
        )
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": "2", **os.environ}
    environment["CMAKE_ARGS"] = f"-DGGML_VULKAN=on {os.environ.get('CMAKE_ARGS', '')}".strip()
    print(f"compiling {PACKAGE} with {environment['CMAKE_ARGS']}", flush=True)
    subprocess.run([str(VENV / "bin/pip"), "install", "--no-cache-dir", PACKAGE], env=environment, check=True)
    return built_library()


def _headers() -> bool:
    """Headers that `CMAKE_ARGS` names are not looked at."""
    if "Vulkan_INCLUDE_DIR" in os.environ.get("CMAKE_ARGS", ""):
        return True
    try:
        text = Path("/usr/include/vulkan/vulkan_core.h").read_text(encoding="utf-8")
    except OSError:
        return False
    patch = re.search(r"^#define VK_HEADER_VERSION (\d+)", text, re.MULTILINE)
    complete = re.search(r"VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION\(0, (\d+), (\d+)", text)
    if patch is None or complete is None:
        return False
    return (int(complete[1]), int(complete[2]), int(patch[1])) >= HEADERS


# --- workers ---


@dataclass
class Bench:
    mesh: Mesh
    environment: dict[str, str]
    model: str
    rates: dict[str, float] = field(default_factory=dict)

    def start(self, *words: str, name: str = "w") -> Process:
        words = ("--model", self.model, "--ctx", "512", "--batch", "64", "--stall-ms", STALL_MS, "--name", name, *words)
        return Process("-m", WORKER, "--broker", self.mesh.address, *words, name=name, env=self.environment, cwd="/")

    @contextmanager
    def worker(self, *words: str, name: str = "w") -> Iterator[Process]:
        process = self.start(*words, name=name)
        try:
            process.line(r": .* is ready, at ", READY_S)
            yield process
        finally:
            process.close()

    def llambo(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", LLAMBO, *words], env={**self.environment, "LLAMBO_BROKER": self.mesh.address},
            capture_output=True, text=True, timeout=ANSWER_S, check=False, cwd="/",
        )  # fmt: skip
        check(f"llambo {' '.join(words)}", done.returncode == 0, done.stderr.strip())
        return done.stdout

    def answers(self, what: str, prompts: Sequence[str]) -> list[list[int]]:
        """Greedy tokens, four answers at a time."""

        async def all_of_them() -> list[list[int]]:
            async with self.mesh.client() as client:
                turns = asyncio.Semaphore(4)

                async def one(prompt: str) -> list[int]:
                    async with turns:
                        answer = await client.generate(prompt, form="user", temperature=0.0, max_tokens=TOKENS)
                        return list(answer.ids)

                return await asyncio.gather(*map(one, prompts))

        began = time.monotonic()
        found = self.mesh.run(all_of_them(), ANSWER_S)
        self.rates[what] = sum(map(len, found)) / (time.monotonic() - began)
        return found


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> str:
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    common = sum(_common(a, b) for a, b in zip(ours, theirs, strict=True))
    tokens = sum(map(len, theirs))
    return f"{equal} of {len(ours)} answers equal; {common} of {tokens} tokens before the first that differs"


def _common(ours: list[int], theirs: list[int]) -> int:
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


# --- what is checked ---


def placement_of(worker: Process) -> str:
    """What it logs at start."""
    return worker.line(r"llambo engine: \S+\.gguf: (.*)", READY_S)[1]


def try_placements(bench: Bench, prompts: Sequence[str]) -> None:
    with bench.worker("--gpu-layers", "0") as worker:
        check("0: the CPU alone", placement_of(worker).startswith("CPU"), placement_of(worker))
        truth = bench.answers("CPU", prompts)
    with bench.worker() as worker:
        text = placement_of(worker)
        check("auto: every layer is on the device", re.match(r"\w+: (\d+)/\1 layers, ", text) is not None, text)
        device = text.partition(":")[0]
        print(bench.llambo("workers"))
        print(bench.llambo("models", bench.model))
        compare(bench, f"{device}, all layers", prompts, truth)
    with bench.worker("--gpu-layers", "12") as worker:
        check("12: so many layers", f"{device}: 12/" in placement_of(worker), placement_of(worker))
        compare(bench, "12 layers", prompts[:2], truth)
    with bench.worker("--gpu-bytes", "60MiB", "--slots", "4") as worker:
        text = placement_of(worker)
        found = re.match(r"\w+: (\d+)/(\d+) layers, .* CPU: \d+ layers \(no more layers fit", text)
        check("auto with little memory: some layers", found is not None and 0 < int(found[1]) < int(found[2]), text)
        compare(bench, "some layers", prompts[:2], truth)
    with bench.worker("--gpu-bytes", "130MiB") as worker:
        text = placement_of(worker)
        check("auto: slots that are not set are given up first", "slots instead of 4" in text, text)


def compare(bench: Bench, what: str, prompts: Sequence[str], truth: list[list[int]]) -> None:
    ours = bench.answers(what, prompts)
    check("answers beside those of the CPU", bool(ours), agreement(ours, truth[: len(ours)]))


def try_refusals(bench: Bench) -> None:
    for layers, limit in (("-1", "60MiB"), ("20", "40MiB")):
        worker = bench.start("--gpu-layers", layers, "--gpu-bytes", limit, "--slots", "4")
        code = worker.end(READY_S)
        refusals = [line for line in worker.lines if re.search(r"layers need \d+ MiB: .*--gpu-layers \d+ would", line)]
        shown = refusals[-1] if refusals else worker.log()
        check(f"{layers} layers in {limit} are refused, status {code}", code != 0 and bool(refusals), shown)
    plain = {**bench.environment, "GGML_DISABLE_VULKAN": "1"}
    plain.pop("GGML_VK_VISIBLE_DEVICES", None)
    worker = Bench(bench.mesh, plain, bench.model).start("--gpu-layers", "-1")
    code = worker.end(READY_S)
    refusal = next((line for line in worker.lines if "-DGGML_CUDA=on" in line), "")
    check(f"layers without a device are refused, status {code}", code != 0 and bool(refusal), refusal or worker.log())


def try_two(bench: Bench) -> None:
    """Both begin at once. The second one measures when the first has allocated."""
    two = [bench.start(name=f"two-{number}") for number in (1, 2)]
    try:
        for worker in two:
            worker.line(r": .* is ready, at ", READY_S)
        check("two workers on one device", True, " | ".join(placement_of(worker) for worker in two))
    finally:
        for worker in two:
            worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", help="libllama.so with the backend Vulkan")
    parser.add_argument("--model", default="smollm2", help="the limits of memory that are tried are for smollm2")
    parser.add_argument("--prompts", type=int, default=4, help="how many answers are compared, up to 20")
    parser.add_argument("--card", action="store_true", help="use the cards that llama.cpp finds by itself")
    given = parser.parse_args()
    library = Path(given.library) if given.library else built_library()
    others = {name: value for name, value in os.environ.items() if not name.startswith("LLAMBO_")}
    environment = {**others, "PYTHONPATH": str(ROOT), "LLAMBO_LLAMA_LIB": str(library.resolve())}
    environment["XDG_CONFIG_HOME"] = "/nonexistent"
    if not given.card:
        environment["GGML_VK_VISIBLE_DEVICES"] = "0"
    report = subprocess.run(
        [sys.executable, "-m", "llambo.worker.llama.binding", str(library)], env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    devices = msgspec.json.decode(report.stdout)["devices"] if not report.returncode else []
    cards = [f"{each['name']} ({each['description']})" for each in devices if each["kind"] in ("gpu", "igpu")]
    check("the library lists a GPU", bool(cards), ", ".join(cards) or report.stderr)
    prompts = [f"What is {subject}?" for subject in SUBJECTS[: given.prompts]]
    with Mesh(0) as mesh:
        bench = Bench(mesh, environment, given.model)
        try_placements(bench, prompts)
        try_refusals(bench)
        try_two(bench)
    cores = f"{host.cpus()} cores"
    print(f"tokens/s, {cores}: " + ", ".join(f"{what} {rate:.1f}" for what, rate in bench.rates.items()))
    print(f"{len(CHECKS)} checks hold")


if __name__ == "__main__":
    main()
