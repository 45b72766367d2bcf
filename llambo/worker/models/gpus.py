"""GPUs of this machine, as the kernel shows them, and what to do if llama.cpp does not use them.

No library is needed: the PCI devices, the drivers' files and the device files are looked at. So a machine whose
llama.cpp was built for CPUs, or whose service may not open the devices, gets advice about a GPU that stays unused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

VENDORS = {0x10DE: "NVIDIA", 0x1002: "AMD", 0x8086: "Intel"}
#: PCI classes of displays, 3D controllers and processing accelerators.
CLASSES = (0x0300, 0x0302, 0x0380, 0x1200)
#: An AMD device with less memory of its own is a part of the processor.
DEDICATED_BYTES = 3 * 1024**3
#: How to compile llama.cpp for them, and the backend of ggml that this gives.
BUILDS = {
    "NVIDIA": ("-DGGML_CUDA=on", "CUDA"),
    "AMD": ("-DGGML_HIP=on", "ROCm"),
    "Intel": ("-DGGML_VULKAN=on", "Vulkan"),
}
#: Backends of ggml that compute on GPUs, and a program that shows whether their driver works.
CHECKS = {"CUDA": "nvidia-smi", "ROCm": "rocminfo", "Vulkan": "vulkaninfo --summary"}
#: The release of llama-cpp-python that this version of llambo knows.
PACKAGE = "llama-cpp-python==0.3.36"
DOCS = "docs/gpu.md"
_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class Gpu:
    vendor: str
    #: For people.
    name: str
    #: A part of the processor, with the memory of the host. It is hardly ever faster than the cores beside it.
    integrated: bool = False
    #: Why this process cannot use it, whatever the library; empty: it can.
    problem: str = ""


def may_use(path: Path) -> bool:
    return os.access(path, os.R_OK | os.W_OK)


def gpus(root: Path = _ROOT, usable: Callable[[Path], bool] = may_use) -> list[Gpu]:
    """`usable`: whether this process may open a device file."""
    found = []
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor = VENDORS.get(_hex(folder / "vendor"))
        if vendor is not None and _hex(folder / "class") >> 8 in CLASSES:
            problem = _nvidia_problem(root, usable) if vendor == "NVIDIA" else _render_problem(root, folder, usable)
            found.append(Gpu(vendor, _name(root, folder, vendor), _integrated(folder, vendor), problem))
    if all(gpu.vendor != "NVIDIA" for gpu in found) and any(root.glob("dev/nvidia[0-9]*")):
        # In some containers and virtual machines the PCI bus is not visible.
        found.append(Gpu("NVIDIA", "an NVIDIA GPU", problem=_nvidia_problem(root, usable)))
    return found


@dataclass(frozen=True, slots=True)
class Advice:
    """What is the matter with a GPU that stays unused, and the command that helps, if there is one."""

    text: str
    command: str = ""

    def __str__(self) -> str:
        return f"{self.text}; compile it: {self.command} ({DOCS})" if self.command else f"{self.text} ({DOCS})"


def command(vendor: str, pip: str = "pip install") -> str:
    """How to compile llama.cpp for these GPUs."""
    return f"CMAKE_ARGS={BUILDS[vendor][0]} {pip} --no-cache-dir --force-reinstall --no-deps {PACKAGE}"


def advice(found: Sequence[Gpu], backends: Sequence[str], pip: str = "pip install") -> Advice | None:
    """What to do about GPUs if the library lists no device; None if there is nothing to do.

    `backends`: those in the library, such as CUDA, BLAS, CPU. Integrated GPUs are no reason for advice.
    """
    dedicated = [gpu for gpu in found if not gpu.integrated]
    if not dedicated:
        return None
    gpu = next((gpu for gpu in dedicated if not gpu.problem), dedicated[0])
    names = " and ".join(dict.fromkeys(each.name for each in dedicated))
    unused = f"{names} stays unused, and models run on the CPU" if len(dedicated) == 1 else f"{names} stay unused"
    if gpu.problem:
        return Advice(f"{unused}: {gpu.problem}")
    fitting = [name for name in backends if name in (BUILDS[gpu.vendor][1], "Vulkan")]
    if fitting:
        checks = " or ".join(f"`{CHECKS[name]}`" for name in fitting)
        return Advice(f"{unused}: llama.cpp has {' and '.join(fitting)} and finds no device; see what {checks} says")
    return Advice(f"{unused}: this llama.cpp is built without {BUILDS[gpu.vendor][1]}", command(gpu.vendor, pip))


def without_devices(layers: int, found: Sequence[Gpu], backends: Sequence[str]) -> str:
    """Why layers that are asked for cannot be on a GPU."""
    wanted = "all layers" if layers < 0 else f"{layers} layers"
    text = f"--gpu-layers {layers}: llama.cpp has no device for {wanted}"
    known = sorted(name for name in backends if name in CHECKS)
    if found:
        gpu = min(found, key=lambda gpu: gpu.integrated)
        return f"{text}; {advice([Gpu(gpu.vendor, gpu.name, problem=gpu.problem)], backends)}"
    if known:
        checks = " or ".join(f"`{CHECKS[name]}`" for name in known)
        return f"{text}: it has {' and '.join(known)}, but this machine shows no GPU; see what {checks} says ({DOCS})"
    others = ", ".join(f"{flag} for {vendor}" for vendor, (flag, _) in BUILDS.items() if vendor != "NVIDIA")
    return (
        f"{text}, because it is built for the CPU only. Compile it for your GPU: {command('NVIDIA')}, or with "
        f"{others} ({DOCS}); or use --gpu-layers 0"
    )


# --- one device ---


def _name(root: Path, folder: Path, vendor: str) -> str:
    try:
        text = (root / "proc/driver/nvidia/gpus" / folder.name / "information").read_text(encoding="utf-8")
        model = re.search(r"^Model:\s*(\S.*)$", text, re.MULTILINE)
        if model:
            return model[1].strip()
    except OSError:
        pass  # another vendor, or no driver
    return f"the {vendor} GPU at {folder.name}"


def _integrated(folder: Path, vendor: str) -> bool:
    if vendor == "AMD":
        try:
            return int((folder / "mem_info_vram_total").read_text(encoding="ascii")) < DEDICATED_BYTES
        except (OSError, ValueError):
            return False
    # Those of Intel's processors are on the first bus; cards are behind a bridge.
    return vendor == "Intel" and folder.name.split(":")[1:2] == ["00"]


def _nvidia_problem(root: Path, usable: Callable[[Path], bool]) -> str:
    control = root / "dev/nvidiactl"
    if control.exists():
        return "" if usable(control) else "this user may not open /dev/nvidiactl"
    if (root / "proc/driver/nvidia/version").exists():
        return _hidden("/dev/nvidiactl")
    return "the driver of NVIDIA is not loaded; `nvidia-smi` has to list the GPU first"


def _render_problem(root: Path, folder: Path, usable: Callable[[Path], bool]) -> str:
    nodes = [root / "dev/dri" / node.name for node in (folder / "drm").glob("renderD*")]
    if not nodes:
        return "its driver is not loaded: there is no /dev/dri/renderD* for it"
    if not any(node.exists() for node in nodes):
        return _hidden(f"/dev/dri/{nodes[0].name}")
    if not any(usable(node) for node in nodes):
        return f"this user may not open /dev/dri/{nodes[0].name}: sudo usermod -aG render,video $USER, and log in again"
    return ""


def _hidden(path: str) -> str:
    return f"{path} is hidden from this process: a container needs it passed in, a unit of systemd a drop-in"


def _hex(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"), 16)
    except (OSError, ValueError):
        return 0
