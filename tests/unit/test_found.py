"""The models of a host, as `llambo models` lists them."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bench import lora, tiny_model
from llambo.cli.kit.failure import Exit
from llambo.cli.main import main
from llambo.mesh.service import host as host_facts
from llambo.worker.config import LlamaOptions
from llambo.worker.llama import binding
from llambo.worker.models import model_files
from llambo.worker.models.model_files import Found


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and an empty working folder."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("XDG_CACHE_HOME", "LLAMA_CACHE", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(model_files, "packaged", lambda name: None)
    return tmp_path


def put(path: Path, content: bytes = tiny_model.whole()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def listed(folder: str = "") -> dict[str, Found]:
    return {Path(each.path).name: each for each in model_files.on_this_host(folder)}


def test_every_usual_place_is_looked_at(host: Path) -> None:
    cache = host / "home/.cache"
    put(host / "work/a.gguf")
    put(host / "work/below/not-this.gguf")
    put(host / "home/models/deep/e.gguf")
    put(cache / "llama.cpp/b.gguf")
    put(cache / "huggingface/hub/models--x--y/snapshots/abc/c.gguf")
    put(host / "mine/deep/d.GGUF")
    put(host / "work/readme.txt")
    seen = model_files.on_this_host(str(host / "mine"))
    assert [(Path(each.path).name, each.where) for each in seen] == [
        ("d.GGUF", "models folder"),
        ("a.gguf", "working folder"),
        ("e.gguf", "~/models"),
        ("b.gguf", "llama.cpp cache"),
        ("c.gguf", "Hugging Face cache"),
    ]
    assert all(model_files.find(each.model).samefile(each.path) for each in seen), "what --model takes"
    assert seen[-1].model == "hf:x/y/c.gguf"


def test_caches_may_be_elsewhere(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CACHE", str(host / "one"))
    monkeypatch.setenv("HF_HUB_CACHE", str(host / "two"))
    put(host / "one/a.gguf")
    put(host / "two/b.gguf")
    put(host / "two/models--x--y/snapshots/abc/c.gguf")
    assert set(listed()) == {"a.gguf", "b.gguf", "c.gguf"}


def test_a_file_is_listed_once_with_its_size_and_context(host: Path) -> None:
    path = put(host / "mine/tiny.gguf")
    (host / "work/tiny.gguf").symlink_to(path)
    (only,) = model_files.on_this_host(str(host / "mine"))
    size = path.stat().st_size
    assert only == Found(str(path), str(path), "models folder", size, "llama", "F32", tiny_model.CONTEXT)


def test_an_adapter_is_no_model(host: Path) -> None:
    base = put(host / "work/a.gguf")
    lora.write(host / "work/pirate.gguf", base, 1)
    assert set(listed()) == {"a.gguf"}


def test_a_link_with_another_name_is_listed_as_one(host: Path) -> None:
    path = put(host / "home/models/qwen.gguf")
    (host / "home/models/coder.gguf").symlink_to("qwen.gguf")
    link, file = model_files.on_this_host()
    assert (link.path, link.where) == (str(path.with_name("coder.gguf")), "~/models, a link to qwen.gguf")
    assert (file.path, file.where, file.size_bytes) == (str(path), "~/models", link.size_bytes)


@pytest.mark.parametrize("name", ["coder", "coder.gguf"])
def test_the_name_of_a_file_in_a_folder_of_models_stands_for_it(host: Path, name: str) -> None:
    path = put(host / "home/models/deep/coder.gguf")
    named = model_files.resolve(name)
    assert (named.model, named.path, named.served_as) == (str(path), path, "coder")
    mine = put(host / "mine/coder.gguf")
    assert model_files.resolve(name, folder=str(host / "mine")).path == mine
    assert model_files.resolve("mine", {"mine": name}).served_as == "mine"
    with pytest.raises(model_files.NoSuchModel, match="no model of that name"):
        model_files.resolve("cod")


def test_a_model_that_no_mesh_serves_is_looked_for_on_this_host(host: Path) -> None:
    put(host / "home/models/coder.gguf")

    def asked(name: str) -> Result:
        words = ("models", name, "--broker", "tcp://127.0.0.1:1", "--connect-ms", "50")
        return CliRunner().invoke(main, words, prog_name="llambo")

    assert "home/models/coder.gguf" in asked("coder").stdout
    assert asked("other").exit_code == Exit.NO_BROKER


def test_what_cannot_be_loaded_is_listed_with_the_reason(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(host / "work/junk.gguf", b"x" * 100)
    put(host / "work/empty.gguf", b"")
    put(host / "work/cut.gguf", tiny_model.whole()[:-5000])
    helper = tiny_model.build()
    helper.entry("general.architecture").value = b"clip"
    put(host / "work/mmproj.gguf", helper.encode())
    problems = {name: each.problem for name, each in listed().items()}
    assert problems["junk.gguf"] == "it is not a GGUF file"
    assert problems["empty.gguf"].startswith("it is")
    assert problems["cut.gguf"].startswith("it is cut off")
    assert "picture encoder" in problems["mmproj.gguf"]
    monkeypatch.setattr(host_facts, "free_memory_bytes", lambda: 1000)
    put(host / "work/large.gguf")
    assert listed()["large.gguf"].problem.startswith("it does not fit: 0 MiB of weights")


def test_without_llama_cpp_nothing_can_be_loaded(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(host / "work/a.gguf")
    monkeypatch.setattr(binding, "PACKAGES", (("no-llama", "no_such_package", ("*.so",)),))
    (only,) = model_files.on_this_host(missing=binding.missing())
    assert only.problem.startswith("llama.cpp is not installed: ") and "pip install" in only.problem


def test_a_model_in_parts_is_one(host: Path) -> None:
    for number in (1, 2, 3):
        put(host / f"work/big-{number:05}-of-00003.gguf")
    (only,) = listed().values()
    assert only.path.endswith("big-00001-of-00003.gguf")
    assert only.size_bytes == 3 * len(tiny_model.whole())


def test_an_installed_package_goes_by_its_name(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(host / "site/packaged.gguf")
    monkeypatch.setattr(model_files, "packaged", lambda name: path)
    (only,) = model_files.on_this_host()
    assert (only.model, only.where) == ("smollm2", "package")


@pytest.mark.parametrize("seed", range(0, 500, 4))
def test_a_damaged_model_is_listed_all_the_same(tmp_path: Path, seed: int) -> None:
    what, content = tiny_model.mutant(seed)
    path = put(tmp_path / "x.gguf", content)
    found = model_files.look_at("x", path, "here", LlamaOptions(), 2**34, 2)
    assert found.size_bytes > 0 or not content, what
