"""Layers on devices, with a real model and llama.cpp for processors.

Here the only device is the CPU. llama.cpp treats it like any other if it is named, so the dry run and an offload can be
tried without a GPU. `make gpu-check` tries them with Vulkan.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from llambo.mesh.wire import limits
from llambo.mesh.wire.messages import Sampling
from llambo.testing.commands import WORKER, command
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import LlamaOptions
from llambo.worker.engine.protocol import Progress, Start
from llambo.worker.llama import binding, dry_run
from llambo.worker.llama.llama_engine import LlamaEngine, Setup
from llambo.worker.models import gguf, model_files, placement
from llambo.worker.models.placement import GIB, MIB, ComputeDevice, Placement
from llambo.worker.models.purpose import Purpose

PATH = str(model_files.find("smollm2"))
LAYERS = 31
#: One slot of 512 tokens: 22.5 kB for each.
OPTIONS = LlamaOptions(slots=1, context=512, threads=1, batch=64, gpu_layers="auto")
HOLD = """
import sys
from llambo.worker.llama import dry_run
with dry_run.taking_turns(print):
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The free bytes of the CPU as a device."""
    found = [20 * GIB]
    monkeypatch.setattr(dry_run, "_devices", lambda library: [ComputeDevice("CPU", "", found[0], 20 * GIB)])
    return found


def ask(options: LlamaOptions) -> dry_run.Answer:
    return dry_run.answer(dry_run.Question(PATH, options))


def greedy(engine: LlamaEngine) -> list[int]:
    start = Start(bytes(limits.RUN_KEY_BYTES), b"The capital of France is", 24, 1, sampling=Sampling(temperature=0.0))
    assert engine.start(start, 0) is None
    ids: list[int] = []
    while True:
        for output in engine.step(0):
            ids += output.ids
            if output.end is not None:
                return ids


def test_sizes_are_those_of_the_file() -> None:
    file = gguf.read(PATH)
    sizes = placement.sizes_of([file])
    layout = model_files.unchecked_layout(OPTIONS, file, 2**40, 1)
    measured = dry_run._measure(PATH, layout, placement.CPU, sizes, Purpose())
    assert sizes.all_layers == LAYERS
    assert sum(measured.cache.values()) == pytest.approx(512 * file.cell_bytes(2.0), rel=0.01)
    assert measured.work([]).host > MIB


def test_a_device_gets_what_fits(free: list[int]) -> None:
    everything = ask(OPTIONS).placement
    assert everything is not None
    assert str(everything).startswith("CPU: 31/31 layers, ")
    need = everything.shares[0].used_bytes
    free[0] = GIB + need
    assert ask(OPTIONS).placement == everything
    free[0] = GIB + need - 30 * MIB
    part = ask(OPTIONS).placement
    assert part is not None
    assert 0 < part.layers < LAYERS
    assert part.shares[0].used_bytes <= need - 30 * MIB
    assert part.host_bytes > everything.host_bytes


def test_a_number_that_does_not_fit_is_refused(free: list[int]) -> None:
    free[0] = GIB + 60 * MIB
    found = ask(LlamaOptions(slots=1, context=512, gpu_layers=-1))
    assert found.placement is None
    assert found.problem.startswith(f"{PATH} does not fit: 31 of 31 layers need ")
    assert "--gpu-layers auto chooses by itself" in found.problem


def test_an_offloaded_model_answers_as_before() -> None:
    """With the CPU as the device of some layers, and of none."""
    layout = model_files.layout(OPTIONS, gguf.read(PATH), 2**40, 1)
    share = placement.Share("CPU", 12, 0, 0)
    made, answers = [], []
    for place in (placement.CPU, Placement((share,), LAYERS, 1, why="as asked for")):
        engine = LlamaEngine(Setup("smollm2", PATH, layout, place, str(place), safe=True))
        made.append(engine._info())
        answers.append(greedy(engine))
        assert engine.ready().note.endswith(f"{place}, safe settings")
    assert answers[0] == answers[1]
    assert len(answers[0]) > 8
    assert [info["devices"] for info in made] == ["CPU", "CPU: 12/31 layers, 0 of 0 GiB, CPU: 19 layers"]
    assert [info.get("placement") for info in made] == [None, "as asked for"]


def test_a_library_without_devices_is_no_problem() -> None:
    assert dry_run.find_placement(PATH, OPTIONS) == dry_run.Answer()
    assert "cannot be loaded" not in dry_run.find_placement("/nonexistent.gguf", OPTIONS).problem


def test_a_child_that_dies_is_an_error_that_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(dry_run.DryRunError, match="the dry run ended with status 1"):
        dry_run.find_placement(PATH, OPTIONS)


def test_layers_that_no_device_can_take_are_refused_with_the_command() -> None:
    worker = command(WORKER, "--engine", "llama", "--model", PATH, "--gpu-layers", "-1", "--broker", "127.0.0.1:1")
    try:
        code = worker.end()
    finally:
        worker.close()
    assert code != 0
    assert "--gpu-layers -1: llama.cpp has no device for all layers" in worker.log(), worker.story("it has no command")
    assert "CMAKE_ARGS=-DGGML_" in worker.log()


def test_engines_of_a_machine_load_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has its turn and is killed: then it is ours."""
    monkeypatch.setattr(dry_run, "TURN", f"\0llambo-test-{id(monkeypatch)}")
    script = HOLD.replace("with dry", f"dry_run.TURN = {dry_run.TURN!r}\nwith dry")
    holder = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"mine\n"
    waiting, mine = threading.Event(), threading.Event()

    def send(progress: Progress) -> None:
        assert progress.note.startswith("waiting for another worker")
        waiting.set()

    def take() -> None:
        with dry_run.taking_turns(send):
            mine.set()

    thread = threading.Thread(target=take)
    thread.start()
    try:
        assert waiting.wait(TIMEOUT_S)
        assert not mine.is_set()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert mine.wait(TIMEOUT_S)
    thread.join(TIMEOUT_S)
    with dry_run.taking_turns(lambda progress: pytest.fail(f"it is free, but {progress.note}")):
        pass


def test_the_library_is_that_of_the_options() -> None:
    with pytest.raises(binding.LibraryError):
        dry_run.answer(dry_run.Question(PATH, LlamaOptions(library="/nonexistent/libllama.so")))
