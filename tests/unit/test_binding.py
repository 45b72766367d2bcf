"""The library of llama.cpp: which one is found, what is checked before it is used, and what the errors say to do."""

from __future__ import annotations

import ctypes
import importlib
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llambo.worker.llama import binding
from llambo.worker.llama.binding import LibraryError, LibraryFile
from llambo.worker.llama.c_api import (
    CONTEXT_DEFAULTS,
    INTERFACES,
    MODEL_DEFAULTS,
    SYSTEM_PACKAGES,
    Interface,
    LlamaBatch,
    ModelParams,
    TokenData,
    TokenDataArray,
    functions,
)
from tests.unit import elf

OLD, NEW = INTERFACES
Functions = dict[str, bytes]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages of llama.cpp, of which neither is there yet."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = [("own-llama", "own_llama_cpp", ("lib/libllama.so",)), ("wheel-llama", "wheel_llama", ("wheel*.so",))]
    monkeypatch.setattr(binding, "PACKAGES", tuple(found))
    return tmp_path / "site"


def put(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    importlib.invalidate_caches()
    return path


# --- which one ----------------------------------------------------------------------------------


def test_what_is_configured_comes_first_then_a_build_of_this_machine_then_the_wheel(packages: Path) -> None:
    with pytest.raises(LibraryError, match=r"not installed: .*install .*\[llama\]'"):
        binding.find()
    wheel = put(packages / "wheel_llama/wheel.abi3.so")
    put(packages / "wheel_llama-1.2.dist-info/METADATA", b"Metadata-Version: 2.1\nName: wheel-llama\nVersion: 1.2\n")
    assert binding.find() == LibraryFile(str(wheel), "wheel-llama", "1.2")
    assert str(binding.find()) == "wheel-llama 1.2"
    put(packages / "own_llama_cpp/__init__.py")  # without a library: it was built elsewhere
    assert binding.find().package == "wheel-llama"
    own = put(packages / "own_llama_cpp/lib/libllama.so")
    assert binding.find() == LibraryFile(str(own), "own-llama", "")
    assert binding.find(str(wheel)).package == "wheel-llama", "a file of a package is that of the package"
    mine = put(packages / "mine/libllama.so")
    assert binding.find(str(mine)) == LibraryFile(str(mine)) == binding.find(str(mine.parent))
    assert str(binding.find(str(mine))) == str(mine)


def test_a_package_is_found_without_importing_it(packages: Path) -> None:
    put(packages / "wheel_llama/__init__.py", b"raise SystemExit('imported')")
    put(packages / "wheel_llama/wheel.so")
    assert binding.find().package == "wheel-llama"


def test_a_path_that_is_wrong_is_refused_with_what_to_do(tmp_path: Path) -> None:
    assert "there is no file" in binding.missing(str(tmp_path / "no.so"))
    assert "libllama.so" in binding.missing(str(tmp_path))
    text = put(tmp_path / "text.so", b"no library at all, but some text")
    with pytest.raises(
        LibraryError, match=r"text.so cannot be loaded as a library \(.*\): name another with --llama-lib"
    ):
        binding.load(binding.find(str(text)))
    assert "cannot be loaded as a library" in binding.examine(str(text)).problem


x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the libraries of this test are for x86-64")


@x86
def test_a_library_that_needs_another_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = LibraryFile(str(put(tmp_path / "x.so", elf.shared_object(honest(OLD), ("libnosuch.so.1",)))), "p", "1")
    with pytest.raises(LibraryError, match=r"p 1 needs libnosuch.so.1, which this machine has not: .*LD_LIBRARY_PATH"):
        binding.load(file)
    monkeypatch.setitem(SYSTEM_PACKAGES, "libnosuch.so.1", {"debian": "libnosuch1"})
    with pytest.raises(LibraryError, match="apt install libnosuch1"):
        binding.load(file)
    assert SYSTEM_PACKAGES["libgomp.so.1"]["debian"] == "libgomp1"


# --- what is checked ------------------------------------------------------------------------------


def params(struct: type[ctypes.Structure], known: dict[str, Any], **more: Any) -> bytes:
    return bytes(struct(**known | more))


def batch(**values: int) -> bytes:
    """As `llama_batch_init` returns it; the addresses are of nothing."""
    kinds: dict[str, Any] = {name: kind for name, kind, *_ in LlamaBatch._fields_}
    addresses = {name: at for at, name in enumerate(("token", "pos", "n_seq_id", "seq_id", "logits"), 4096)} | values
    return bytes(LlamaBatch(**{name: ctypes.cast(at, kinds[name]) for name, at in addresses.items()}))


def honest(interface: Interface) -> Functions:
    """A library with this interface. Any function that is called for another reason than the checks is deadly."""
    context = params(interface.context_params, CONTEXT_DEFAULTS)
    return dict.fromkeys(functions(interface), elf.DEADLY) | {
        "llama_model_default_params": elf.returns_struct(params(ModelParams, MODEL_DEFAULTS)),
        "llama_context_default_params": elf.returns_struct(context),
        "llama_sampler_chain_default_params": elf.returns(1),
        "llama_batch_init": elf.returns_struct(batch()),
        "llama_sampler_init_top_k": elf.returns(1),
        "llama_sampler_apply": elf.APPLIES_TOP_K,
        "llama_sampler_free": elf.RETURN,
        "ggml_backend_reg_count": elf.returns(1),
    }


def made(folder: Path, library: Functions, package: str = "", version: str = "") -> LibraryFile:
    # Each under a name of its own: a file that is loaded must not be written.
    path = folder / f"lib{len(list(folder.iterdir()))}.so"
    return LibraryFile(str(put(path, elf.shared_object(library))), package, version)


@x86
@pytest.mark.parametrize("interface", INTERFACES, ids=lambda interface: interface.name)
def test_each_known_interface_is_recognised(tmp_path: Path, interface: Interface) -> None:
    # Also in a release that is not listed.
    assert binding.load(made(tmp_path, honest(interface))).interface is interface
    for package, version in interface.releases:
        assert binding.load(made(tmp_path, honest(interface), package, version)).interface is interface


def context_of(**values: Any) -> Callable[[], Functions]:
    content = params(OLD.context_params, CONTEXT_DEFAULTS, **values)
    return lambda: {"llama_context_default_params": elf.returns_struct(content)}


def model_of(**values: Any) -> Callable[[], Functions]:
    return lambda: {"llama_model_default_params": elf.returns_struct(params(ModelParams, MODEL_DEFAULTS, **values))}


def raw_context(change: Callable[[bytearray], None]) -> Callable[[], Functions]:
    content = bytearray(params(OLD.context_params, CONTEXT_DEFAULTS))
    change(content)
    return lambda: {"llama_context_default_params": elf.returns_struct(bytes(content))}


def double_switch(content: bytearray) -> None:
    content[OLD.context_params.offload_kqv.offset] = 2


LIES: dict[str, tuple[Callable[[], Functions], str]] = {
    "a field more": (raw_context(lambda content: content.extend(bytes(8))), "_context_params is longer than 160 bytes"),
    "a field less": (raw_context(lambda content: content.__delitem__(slice(104, 112))), "ctx_other is not written"),
    "two fields exchanged": (context_of(n_ctx=2048, n_batch=512), "n_ctx is 00080000 by default"),
    "a switch moved": (context_of(embeddings=True, offload_kqv=False), "embeddings is 01 by default"),
    "a switch of 2": (raw_context(double_switch), "offload_kqv is 02 by default"),
    "an address moved": (context_of(cb_eval_user_data=1), "cb_eval_user_data is 0100000000000000 by default"),
    "another meaning": (context_of(flash_attn_type=0), "flash_attn_type is 00000000 by default"),
    "model: no struct": (lambda: {"llama_model_default_params": elf.returns(1)}, "params.devices is not written"),
    "model: another field": (model_of(main_gpu=-1), "main_gpu is ffffffff by default"),
    "model: an address": (model_of(devices=1), "devices is 0100000000000000 by default"),
    "chain: a struct": (
        lambda: {"llama_sampler_chain_default_params": elf.returns_struct(b"\1" * 24)}, "longer than a register"
    ),
    "chain: off": (lambda: {"llama_sampler_chain_default_params": elf.returns(0)}, "no_perf is not 1"),
    "batch: longer": (lambda: {"llama_batch_init": elf.returns_struct(batch() + bytes(8))}, "longer than 56 bytes"),
    "batch: other order": (
        lambda: {"llama_batch_init": elf.returns_struct(batch(token=0, embd=1))}, "llama_batch has other fields"
    ),
    "batch: embeddings": (lambda: {"llama_batch_init": elf.returns_struct(batch(embd=1))}, "_batch has other fields"),
    "candidates": (lambda: {"llama_sampler_apply": elf.RETURN}, "llama_token_data_array has other fields"),
}  # fmt: skip


@x86
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("release", [("llama-cpp-python", "0.3.36"), ("", "")], ids=["known", "unknown"])
def test_a_library_that_lies_about_its_layout_is_refused(tmp_path: Path, lie: str, release: tuple[str, str]) -> None:
    change, reason = LIES[lie]
    file = made(tmp_path, honest(OLD) | change(), *release)
    with pytest.raises(LibraryError, match="has an interface that llambo does not know") as refused:
        binding.load(file)
    text = str(refused.value)
    assert reason in text
    assert file.path in text
    assert "llambo knows llama-cpp-python 0.3.36 or xllamacpp 2026.10.11549: " in text
    wanted = "pip install 'llama-cpp-python==0.3.36'" if release[0] else "name another with --llama-lib"
    assert wanted in text


@x86
def test_a_release_has_the_interface_that_it_is_known_for_and_no_other(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match=r"llama-cpp-python 0.3.36 \(.*llama_context_params"):
        binding.load(made(tmp_path, honest(NEW), "llama-cpp-python", "0.3.36"))
    with pytest.raises(LibraryError, match=r"xllamacpp 2026.10.11549 \(.*llama_context_params"):
        binding.load(made(tmp_path, honest(OLD), "xllamacpp", "2026.10.11549"))


@x86
def test_a_library_without_a_function_is_refused(tmp_path: Path) -> None:
    library = honest(OLD)
    del library["llama_memory_seq_rm"]
    with pytest.raises(LibraryError, match=r"\(it has no llama_memory_seq_rm\)"):
        binding.load(made(tmp_path, library))
    other = made(tmp_path, {"ggml_version": elf.returns(0)})
    with pytest.raises(LibraryError, match=r"\(it has no \w+, \w+, \w+ and \d\d more functions\)"):
        binding.load(other)


@x86
def test_a_library_that_ends_its_process_ends_no_other(tmp_path: Path) -> None:
    # Given a library that passes every check, and whose first real function is deadly
    file = made(tmp_path, honest(OLD))
    # Then a report about it says so
    assert "was killed by SIGILL" in binding.examine(file.path).problem
    # ... and a liar is refused before anything of it is called
    liar = made(tmp_path, honest(OLD) | LIES["a field more"][0]())
    report = binding.examine(liar.path)
    assert "llama_context_params is longer" in report.problem
    assert report.path == liar.path


@x86
def test_where_written_bytes_do_not_show_only_known_releases_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binding, "SHOWS_WRITES", False)
    # ... structs are returned through a register there: this processor does it like that for a declared struct, too.
    assert binding.load(made(tmp_path, honest(NEW), "xllamacpp", "2026.10.11549")).interface is NEW
    with pytest.raises(LibraryError, match="on this processor its structs cannot be checked"):
        binding.load(made(tmp_path, honest(NEW)))


# --- against the declarations of others ---------------------------------------------------------------


def kind(of: Any) -> Any:
    """Of a ctypes type: what decides how it is passed. All addresses are alike, but those of functions."""
    if of is None:
        return None
    if issubclass(of, ctypes._CFuncPtr):  # type: ignore[attr-defined]
        return "function", kind(of._restype_), [kind(each) for each in of._argtypes_]
    if issubclass(of, ctypes.Structure):
        return "struct", [(name, kind(field), place.offset, place.size) for name, field, place in members(of)]
    if issubclass(of, ctypes._Pointer) or of in (ctypes.c_void_p, ctypes.c_char_p):
        return "address"
    return of._type_, ctypes.sizeof(of)


def members(struct: type[ctypes.Structure]) -> list[tuple[str, Any, Any]]:
    return [(name, field, getattr(struct, name)) for name, field, *_ in struct._fields_]


@pytest.mark.needs("llama-native")
def test_structs_and_functions_are_those_of_llama_cpp_python() -> None:
    import llama_cpp

    ours, compared = functions(OLD), 0
    for name, (result, arguments) in ours.items():
        theirs = getattr(llama_cpp, name, None)
        assert theirs is not None or name.startswith("ggml_"), f"llama-cpp-python does not declare {name}"
        if theirs is not None:
            assert kind(result) == kind(theirs.restype), name
            assert list(map(kind, arguments)) == list(map(kind, theirs.argtypes)), name
            compared += 1
    assert compared > 40
    # Behind addresses.
    assert kind(TokenDataArray) == kind(llama_cpp.llama_token_data_array)
    assert kind(TokenData) == kind(llama_cpp.llama_token_data)
    assert kind(ctypes.POINTER(ctypes.c_int)) != kind(ctypes.c_int)
