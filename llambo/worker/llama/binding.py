"""llama.cpp's library: found, checked and loaded with ctypes. No compiler is needed, and no Python package of it.

    find(configured)    which library: path, package, version. Reads folders only, loads nothing.
    load(file)          the `Library`: its functions as attributes, after the checks below. For child processes only.
    examine(configured) loads it in a child process and reports: versions, devices with their memory. For any process.

A `Library` also has `devices()`, `supports_gpu`, `system_info` and `versions`. Any of this may abort the process,
as C++ does: so only an engine child, or a child made for the purpose, calls `load`.

The danger is layout. Structs are passed by value, and their fields move from release to release: a mismatch reads and
writes wrong memory without an error. Each release of a package whose interface was compared field by field is listed in
`c_api.py`. Before the first struct is passed, `check` has the library write its default parameters into a buffer with
room to spare, filled with a pattern: each field must be written, nothing after the last one, and known fields must have
their known values. A release that is not listed is used only if exactly one known interface passes all of that.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import subprocess
import sys
from ctypes import c_bool, c_float, c_int, c_int32, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from llambo.mesh.service.extras import extra_command
from llambo.mesh.service.host import exit_text
from llambo.worker.llama.c_api import (
    CONTEXT_DEFAULTS,
    INTERFACES,
    MODEL_DEFAULTS,
    SYSTEM_PACKAGES,
    DeviceProps,
    Interface,
    LlamaBatch,
    ModelParams,
    TokenData,
    TokenDataArray,
    c_name,
    functions,
)

log = logging.getLogger("llambo.engine")

#: Names of functions that an error shows.
SHOWN = 3
#: Distribution, package, and where in it the library is. The first that is installed is used: a library that was
#: compiled on this machine, perhaps for its GPU, comes before a prebuilt one.
PACKAGES = (
    ("llama-cpp-python", "llama_cpp", ("lib/libllama.so", "lib/libllama.dylib")),
    ("xllamacpp", "xllamacpp", ("xllamacpp*.so",)),
)
#: From ggml-backend.h.
DEVICE_KINDS = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel"}
#: Room for a struct that a library returns. The largest has 168 bytes.
ROOM_BYTES = 1024
#: Here a function returns a large struct through a pointer that is its first argument. So the buffer can be filled
#: beforehand, and shows which bytes were written. Elsewhere the pointer is in a register that ctypes cannot set.
SHOWS_WRITES = platform.machine() in ("x86_64", "AMD64")
#: Bytes of the buffer before a call. A written byte may equal one of them, an address by chance even several.
PATTERNS = (0xAA, 0x55, 0x33, 0xCC)
#: How long a child may take to load the library and count the devices.
EXAMINE_S = 60.0


#: Why there is no library to use, for programs: none is installed; the configured file is missing; it needs a shared
#: library that is missing; it is not one for this machine; its interface is not known; it ended the process that loaded
#: it; it took too long.
Cause = Literal["", "not installed", "no file", "needs", "not loaded", "unknown", "ended", "slow"]


class LibraryError(Exception):
    """llama.cpp cannot be used; the text says why, and what to do. `needs`: the shared library that is missing."""

    def __init__(self, cause: Cause, reason: str, advice: str, needs: str = "") -> None:
        super().__init__(f"{reason}: {advice}")
        self.cause: Cause = cause
        self.reason, self.needs = reason, needs


# --- Which library. ---


@dataclass(frozen=True, slots=True)
class LibraryFile:
    path: str
    #: The distribution that it belongs to, and its version; both empty for a library of the user's own.
    package: str = ""
    version: str = ""

    def __str__(self) -> str:
        return f"{self.package} {self.version}".strip() if self.package else self.path


def _place(file: LibraryFile) -> str:
    return f"{file} ({file.path})" if file.package else file.path


def find(configured: str = "") -> LibraryFile:
    """The library that is used: `configured` (a file, or a folder with libllama.so), else that of a package."""
    here = installed()
    if not configured:
        if not here:
            raise LibraryError("not installed", "llama.cpp is not installed", extra_command("llama"))
        return here[0]
    path = Path(configured).expanduser()
    path = path / "libllama.so" if path.is_dir() else path
    if not path.is_file():
        text = f"--llama-lib: there is no file {path}"
        raise LibraryError("no file", text, "name the libllama.so of a build of llama.cpp")
    real = os.path.realpath(path)
    return next((file for file in here if os.path.realpath(file.path) == real), LibraryFile(real))


def missing(configured: str = "") -> str:
    """Why there is no library, and what to do; empty if there is one."""
    try:
        find(configured)
    except LibraryError as error:
        return str(error)
    return ""


def installed() -> list[LibraryFile]:
    """Those of Python packages, the preferred one first."""
    found = []
    for distribution, package, patterns in PACKAGES:
        # A top-level package is found without importing it.
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            paths = [path for pattern in patterns for path in sorted(Path(folder).glob(pattern))]
            if paths:
                found.append(LibraryFile(str(paths[0]), distribution, _version_of(distribution)))
                break
    return found


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


# --- The checks. ---


def check(native: ctypes.CDLL, file: LibraryFile) -> Interface:
    """The interface of this library. Raises LibraryError before any struct has been passed to it."""
    listed = [each for each in INTERFACES if (file.package, file.version) in each.releases]
    reasons = {each.name: _mismatch(native, each) for each in listed or INTERFACES}
    fitting = [each for each in listed or INTERFACES if not reasons[each.name]]
    if len(fitting) == 1 and (listed or SHOWS_WRITES):
        if not listed:
            log.info("%s: this release is not known; its structs are those of %s", file, fitting[0].name)
        return fitting[0]
    why = "; ".join(f"as {name}: {reason}" for name, reason in reasons.items() if reason)
    if len(set(reasons.values())) == 1:
        (why,) = set(reasons.values())
    if fitting:
        why = "this release is not known, and on this processor its structs cannot be checked"
    releases = [release for each in INTERFACES for release in sorted(each.releases)]
    known = " or ".join(f"{package} {version}" for package, version in releases)
    text = f"{_place(file)} has an interface that llambo does not know ({why}); llambo knows {known}"
    # The wheel alone would not help: this library comes before it.
    same = [f"pip install '{package}=={version}'" for package, version in releases if package == file.package]
    raise LibraryError("unknown", text, same[-1] if same else _another())


def _mismatch(native: ctypes.CDLL, interface: Interface) -> str:
    """Why the library does not have this interface; empty if it has. No struct is passed by value here."""
    if missing := [name for name in functions(interface) if not hasattr(native, name)]:
        more = f" and {len(missing) - SHOWN} more functions" if len(missing) > SHOWN else ""
        return f"it has no {', '.join(missing[:SHOWN])}{more}"
    return (
        _wrong_defaults(native, "llama_model_default_params", ModelParams, MODEL_DEFAULTS)
        or _wrong_defaults(native, "llama_context_default_params", interface.context_params, CONTEXT_DEFAULTS)
        or _wrong_chain(native)
        or _wrong_batch(native)
        or _wrong_candidates(native)
    )


class _Room(ctypes.Structure):
    _fields_ = [("content", ctypes.c_ubyte * ROOM_BYTES)]


def _returned(native: ctypes.CDLL, name: str, *arguments: int) -> tuple[bytes, frozenset[int] | None]:
    """The struct that a function returns, in more room than it needs; and which bytes were written, where it shows."""
    # native[name] is an object of its own each time: its types do not change those that llambo calls with.
    if not SHOWS_WRITES:
        function = native[name]
        function.restype = _Room
        return bytes(function(*map(c_int32, arguments)).content), None
    content, written = b"", set[int]()
    for pattern in PATTERNS:
        room = _Room()
        ctypes.memset(ctypes.byref(room), pattern, ROOM_BYTES)
        function = native[name]
        function.restype = None
        function(ctypes.byref(room), *map(c_int32, arguments))
        content = bytes(room.content)
        written |= {at for at, byte in enumerate(content) if byte != pattern}
    return content, frozenset(written)


def _wrong_size(struct: type[ctypes.Structure], written: frozenset[int] | None) -> str:
    if written is None:
        return ""
    for name, field in _places(struct):
        if not written.issuperset(range(field.offset, field.offset + field.size)):
            return f"{c_name(struct)}.{name} is not written"
    size = ctypes.sizeof(struct)
    return f"{c_name(struct)} is longer than {size} bytes" if written and max(written) >= size else ""


def _places(struct: type[ctypes.Structure]) -> list[tuple[str, Any]]:
    return [(name, getattr(struct, name)) for name, *_ in struct._fields_]


def _wrong_defaults(native: ctypes.CDLL, name: str, struct: type[ctypes.Structure], known: dict[str, Any]) -> str:
    content, written = _returned(native, name)
    if wrong := _wrong_size(struct, written):
        return wrong
    values = struct.from_buffer_copy(content)
    for (field, kind, *_), (_, place) in zip(struct._fields_, _places(struct), strict=True):
        raw = content[place.offset : place.offset + place.size]
        if field in known:
            fits = getattr(values, field) == known[field] and (kind is not c_bool or raw in (b"\0", b"\1"))
        else:
            fits = kind in (c_int, c_int32, c_uint32, c_float, c_size_t) or raw == bytes(place.size)
            fits = fits or (kind is c_bool and raw == b"\1")
        if not fits:
            return f"{c_name(struct)}.{field} is {raw.hex()} by default"
    return ""


def _wrong_chain(native: ctypes.CDLL) -> str:
    """One switch is returned in a register: the buffer is not written."""
    if SHOWS_WRITES and _returned(native, "llama_sampler_chain_default_params")[1]:
        return "llama_sampler_chain_params is longer than a register"
    function = native["llama_sampler_chain_default_params"]
    function.restype = ctypes.c_uint8
    return "" if function() == 1 else "llama_sampler_chain_params.no_perf is not 1 by default"


def _wrong_candidates(native: ctypes.CDLL) -> str:
    """A top-k of 1 has to leave the likeliest of three candidates. They are passed by address."""
    data = (TokenData * 3)(TokenData(7, 0.5), TokenData(8, 2.0), TokenData(9, 1.0))
    room = _Room()
    array = TokenDataArray.from_buffer(room)
    array.data, array.size, array.selected = data, 3, -1
    init, apply, free = (native[f"llama_sampler_{name}"] for name in ("init_top_k", "apply", "free"))
    init.restype = c_void_p
    apply.restype = free.restype = None
    apply.argtypes, free.argtypes = [c_void_p, c_void_p], [c_void_p]
    sampler = init(1)
    apply(sampler, ctypes.addressof(room))
    free(sampler)
    size = ctypes.sizeof(TokenDataArray)
    if array.size != 1 or array.data[0].id != 8 or any(room.content[size:]):
        return "llama_token_data_array has other fields"
    return ""


def _wrong_batch(native: ctypes.CDLL) -> str:
    """Of a batch for tokens all pointers are set but that of embeddings. Its few bytes stay allocated."""
    content, written = _returned(native, "llama_batch_init", 3, 0, 1)
    if wrong := _wrong_size(LlamaBatch, written):
        return wrong
    batch = LlamaBatch.from_buffer_copy(content)
    arrays = [batch.token, batch.pos, batch.n_seq_id, batch.seq_id, batch.logits]
    if batch.n_tokens or batch.embd or not all(arrays):
        return "llama_batch has other fields"
    return ""


# --- The library, loaded. ---


class Device(msgspec.Struct, frozen=True):
    """What llama.cpp can compute with. `kind`: cpu, gpu, igpu (its memory is the system's), accel, or other."""

    name: str
    description: str
    kind: str
    free_bytes: int
    total_bytes: int
    #: On the PCI bus, if it is known: two backends may list the same card.
    address: str = ""


class Library:
    """llama.cpp: each function of `c_api.py` is an attribute, with its types."""

    def __init__(self, native: ctypes.CDLL, file: LibraryFile, interface: Interface) -> None:
        self.file = file
        self.interface = interface
        for name, (result, arguments) in functions(interface).items():
            function = native[name]
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        if not self.ggml_backend_reg_count():
            # A build whose devices are libraries of their own, beside this one.
            self.ggml_backend_load_all_from_path(os.fsencode(Path(file.path).resolve().parent))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"c_api.py does not declare {name}")

    def __str__(self) -> str:
        """For people: package and version, or what a library of the user's own says of itself."""
        return str(self.file) if self.file.package else f"llama.cpp {self.versions}, {self.file.path}"

    @property
    def versions(self) -> str:
        parts = (self.llama_version(), b"ggml", self.ggml_version(), self.ggml_commit())
        return b" ".join(part for part in parts if part != b"unknown").decode(errors="replace")

    @property
    def supports_gpu(self) -> bool:
        return bool(self.llama_supports_gpu_offload())

    @property
    def system_info(self) -> str:
        """The instructions that this build uses on this machine."""
        return str(self.llama_print_system_info().decode(errors="replace")).strip(" |")

    def devices(self) -> list[Device]:
        return [self._device(self.ggml_backend_dev_get(at)) for at in range(self.ggml_backend_dev_count())]

    def _device(self, handle: int) -> Device:
        free, total = c_size_t(), c_size_t()
        self.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
        return Device(
            self.ggml_backend_dev_name(handle).decode(errors="replace"),
            self.ggml_backend_dev_description(handle).decode(errors="replace"),
            DEVICE_KINDS.get(self.ggml_backend_dev_type(handle), "other"),
            free.value,
            total.value,
            self._address(handle),
        )

    def _address(self, handle: int) -> str:
        """Of a library that is not known, the struct may have other fields."""
        if (self.file.package, self.file.version) not in self.interface.releases:
            return ""
        props = DeviceProps()
        self.ggml_backend_dev_get_props(handle, ctypes.byref(props))
        return (props.device_id or b"").decode(errors="replace")

    def backends(self) -> list[str]:
        """What it was built for, also without a device: CUDA, ROCm, Vulkan, BLAS, CPU."""
        handles = [self.ggml_backend_reg_get(at) for at in range(self.ggml_backend_reg_count())]
        return [self.ggml_backend_reg_name(handle).decode(errors="replace") for handle in handles]


def _another() -> str:
    return f"name another with --llama-lib, or, without that setting, {extra_command('llama')}"


def load(file: LibraryFile) -> Library:
    """Only in a process that may abort. Raises LibraryError."""
    try:
        native = ctypes.CDLL(file.path)
    except OSError as error:
        raise _not_loaded(file, str(error)) from error
    return Library(native, file, check(native, file))


def _not_loaded(file: LibraryFile, error: str) -> LibraryError:
    missing = re.match(r"(\S+): cannot open shared object file", error)
    if missing and missing[1] != file.path:
        package = SYSTEM_PACKAGES.get(missing[1], {}).get("debian")
        how = (
            f"apt install {package}" if package else "install what it belongs to, or put its folder in LD_LIBRARY_PATH"
        )
        return LibraryError("needs", f"{file} needs {missing[1]}, which this machine has not", how, missing[1])
    text = f"{file} cannot be loaded as a library ({error.removeprefix(f'{file.path}: ')})"
    return LibraryError("not loaded", text, _another())


# --- From any process. ---


class LibraryReport(msgspec.Struct, frozen=True):
    """What a child process found. With a `problem` only the fields before it are known, and the last three."""

    path: str = ""
    package: str = ""
    version: str = ""
    #: Why it cannot be used, and what to do; empty if it can.
    problem: str = ""
    #: Package and version, or what the library says of itself.
    name: str = ""
    versions: str = ""
    supports_gpu: bool = False
    system_info: str = ""
    devices: list[Device] = []
    #: What it was built for: CUDA, ROCm, Vulkan, BLAS, CPU.
    backends: list[str] = []
    #: Of the problem: its kind, its text without what to do, and the shared library that is missing.
    cause: Cause = ""
    reason: str = ""
    needs: str = ""


def _report_of(error: LibraryError, file: LibraryFile | None = None) -> LibraryReport:
    place = (file.path, file.package, file.version) if file else ("", "", "")
    return LibraryReport(*place, problem=str(error), cause=error.cause, reason=error.reason, needs=error.needs)


def examine(configured: str = "") -> LibraryReport:
    """Load the library in a child process, which it may end, and report what it says."""
    try:
        file = find(configured)
    except LibraryError as error:
        return _report_of(error)
    command = [sys.executable, "-m", __name__, file.path]
    cause: Cause = "ended"
    try:
        child = subprocess.run(command, capture_output=True, timeout=EXAMINE_S, check=False)
        return msgspec.json.decode(child.stdout, type=LibraryReport)
    except subprocess.TimeoutExpired:
        cause, reason = "slow", f"{_place(file)} was not loaded within {EXAMINE_S:g} s"
    except msgspec.DecodeError:
        last = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        reason = f"{_place(file)} ended the process that loaded it, which {exit_text(child.returncode)}"
        reason += f": {last}" if last else ""
    return _report_of(LibraryError(cause, reason, "--llama-lib names another"), file)


def _report(configured: str = "") -> LibraryReport:
    file = find(configured)
    try:
        library = load(file)
    except LibraryError as error:
        return _report_of(error, file)
    return LibraryReport(
        file.path,
        file.package,
        file.version,
        "",
        str(library),
        library.versions,
        library.supports_gpu,
        library.system_info,
        library.devices(),
        library.backends(),
    )


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(_report(*sys.argv[1:2])))
