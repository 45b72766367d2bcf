"""GPUs as the kernel shows them, in made-up file systems, and the advice about those that stay unused."""

from __future__ import annotations

from pathlib import Path

import pytest

from llambo.worker.llama.c_api import INTERFACES
from llambo.worker.models.gpus import PACKAGE, Gpu, advice, command, gpus, without_devices

GIB = 1024**3


def pci(root: Path, address: str, vendor: int, class_: int = 0x030000, node: str = "", vram: int | None = None) -> None:
    folder = root / "sys/bus/pci/devices" / address
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor:#06x}\n")
    (folder / "class").write_text(f"{class_:#08x}\n")
    if node:
        (folder / "drm" / node).mkdir(parents=True)
    if vram is not None:
        (folder / "mem_info_vram_total").write_text(f"{vram}\n")


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("")


def nvidia(root: Path, *paths: str) -> None:
    pci(root, "0000:01:00.0", 0x10DE, 0x030200)
    touch(root, *paths)


def test_a_machine_without_gpus(tmp_path: Path) -> None:
    assert gpus(tmp_path) == []
    pci(tmp_path, "0000:02:00.0", 0x1A03)  # the display of a management controller
    pci(tmp_path, "0000:00:1f.3", 0x8086, 0x040300)  # sound
    assert gpus(tmp_path) == []
    assert advice([], ["CPU"]) is None


def test_an_nvidia_card_has_the_name_that_its_driver_gives(tmp_path: Path) -> None:
    nvidia(tmp_path, "dev/nvidiactl", "dev/nvidia0", "proc/driver/nvidia/version")
    information = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information"
    information.parent.mkdir(parents=True)
    information.write_text("Model: \t\t NVIDIA GeForce RTX 3090\nIRQ:   \t\t 66\n")
    assert gpus(tmp_path) == [Gpu("NVIDIA", "NVIDIA GeForce RTX 3090")]


@pytest.mark.parametrize(
    ("files", "usable", "problem"),
    [
        ([], True, "the driver of NVIDIA is not loaded"),
        (["proc/driver/nvidia/version"], True, "/dev/nvidiactl is hidden from this process"),
        (["proc/driver/nvidia/version", "dev/nvidiactl"], False, "this user may not open /dev/nvidiactl"),
        (["proc/driver/nvidia/version", "dev/nvidiactl"], True, ""),
    ],
)
def test_what_is_in_the_way_of_an_nvidia_card(tmp_path: Path, files: list[str], usable: bool, problem: str) -> None:
    nvidia(tmp_path, *files)
    (gpu,) = gpus(tmp_path, lambda path: usable)
    assert gpu.name == "the NVIDIA GPU at 0000:01:00.0"
    assert gpu.problem.startswith(problem) and bool(gpu.problem) == bool(problem)
    assert gpu.problem in str(advice([gpu], ["CPU"]))


def test_a_card_without_a_visible_bus(tmp_path: Path) -> None:
    touch(tmp_path, "dev/nvidia0", "dev/nvidiactl")
    assert gpus(tmp_path) == [Gpu("NVIDIA", "an NVIDIA GPU")]


@pytest.mark.parametrize(
    ("node", "files", "usable", "problem"),
    [
        ("", [], True, "its driver is not loaded"),
        ("renderD128", [], True, "/dev/dri/renderD128 is hidden from this process"),
        ("renderD128", ["dev/dri/renderD128"], False, "this user may not open /dev/dri/renderD128: sudo usermod"),
        ("renderD128", ["dev/dri/renderD128"], True, ""),
    ],
)
def test_what_is_in_the_way_of_other_cards(
    tmp_path: Path, node: str, files: list[str], usable: bool, problem: str
) -> None:
    pci(tmp_path, "0000:03:00.0", 0x1002, node=node, vram=16 * GIB)
    touch(tmp_path, *files)
    (gpu,) = gpus(tmp_path, lambda path: usable)
    assert (gpu.vendor, gpu.integrated) == ("AMD", False)
    assert gpu.problem.startswith(problem) and bool(gpu.problem) == bool(problem)


def test_parts_of_processors_are_no_reason_for_advice(tmp_path: Path) -> None:
    pci(tmp_path, "0000:00:02.0", 0x8086)
    pci(tmp_path, "0000:0a:00.0", 0x1002, vram=GIB // 2)
    pci(tmp_path, "0000:03:00.0", 0x8086)  # a card
    found = gpus(tmp_path)
    assert [gpu.integrated for gpu in found] == [True, False, True]
    assert advice([gpu for gpu in found if gpu.integrated], ["CPU"]) is None
    assert "0000:03:00.0" in str(advice(found, ["CPU"]))


@pytest.mark.parametrize(("vendor", "flag"), [("NVIDIA", "CUDA"), ("AMD", "HIP"), ("Intel", "VULKAN")])
def test_a_library_for_cpus_is_compiled_again(vendor: str, flag: str) -> None:
    text = str(advice([Gpu(vendor, "a card")], ["BLAS", "CPU"]))
    assert text.startswith("a card stays unused, and models run on the CPU: this llama.cpp is built without ")
    assert f"; compile it: CMAKE_ARGS=-DGGML_{flag}=on pip install " in text
    assert command(vendor) in text


@pytest.mark.parametrize(
    ("vendor", "backends", "check"),
    [("NVIDIA", ["CUDA", "CPU"], "`nvidia-smi`"), ("AMD", ["ROCm", "CPU"], "`rocminfo`"),
     ("AMD", ["Vulkan"], "`vulkaninfo --summary`"), ("NVIDIA", ["Vulkan"], "`vulkaninfo --summary`")],
)  # fmt: skip
def test_a_library_that_fits_and_finds_nothing(vendor: str, backends: list[str], check: str) -> None:
    text = str(advice([Gpu(vendor, "a card")], backends))
    assert f"{backends[0]} and finds no device; see what {check} says" in text


def test_a_card_that_could_be_used_comes_first() -> None:
    text = str(advice([Gpu("NVIDIA", "old", problem="no driver"), Gpu("AMD", "new")], ["CPU"]))
    assert text.startswith("old and new stay unused: this llama.cpp is built without ROCm")


def test_layers_without_a_device_are_refused_with_the_command_that_helps() -> None:
    plain = without_devices(-1, [], ["CPU"])
    assert plain.startswith("--gpu-layers -1: llama.cpp has no device for all layers, because it is built for the CPU")
    assert command("NVIDIA") in plain and "-DGGML_HIP=on for AMD, -DGGML_VULKAN=on for Intel" in plain
    assert plain.endswith("or use --gpu-layers 0")
    assert "`vulkaninfo --summary`" in without_devices(20, [], ["Vulkan", "CPU"])
    assert command("Intel") in without_devices(20, [Gpu("Intel", "a part", integrated=True)], ["CPU"])
    card, part = Gpu("NVIDIA", "a card"), Gpu("Intel", "a part", integrated=True)
    assert command("NVIDIA") in without_devices(20, [part, card], ["CPU"])


def test_the_release_that_is_advised_is_one_that_the_binding_knows() -> None:
    assert tuple(PACKAGE.split("==")) in {release for each in INTERFACES for release in each.releases}
