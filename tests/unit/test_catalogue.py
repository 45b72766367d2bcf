"""Which models a host can load, and what each needs."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from bench import lora, tiny_model
from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import printable
from llambo.worker.config import RAM, Adapter, LlamaOptions, WorkerConfig
from llambo.worker.host import catalogue
from llambo.worker.host.catalogue import BadName, Capacity, Catalogue, Servable
from llambo.worker.llama import dry_run
from llambo.worker.models import gguf, model_files
from llambo.worker.models.placement import ComputeDevice, Placement, Share
from tests.unit.test_models import tiny

MIB, GIB = 1024 * 1024, 1024**3
LLAMA = WorkerConfig(engine="llama", llama=LlamaOptions(slots=4, fewer_slots=True))
FAKE = WorkerConfig(engine="fake")


def scan(*named: str | Path, budget: int = 4 * GIB, template: WorkerConfig = LLAMA) -> dict[str, Servable]:
    room = Capacity({RAM: budget}, {RAM: budget})
    return Catalogue(tuple(map(str, named)), template, room).scan()


def folder(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        tiny(path / name)
    return path


def test_a_folder_a_file_and_a_link_to_one_of_them(tmp_path: Path) -> None:
    folder(tmp_path, "all/a.gguf", "all/deep/b.gguf", "c.gguf")
    (tmp_path / "all/same.gguf").symlink_to(tmp_path / "c.gguf")
    found = scan(tmp_path / "c.gguf", tmp_path / "all")
    assert set(found) == {"a", "b", "c"}
    assert found["b"].config.model == str(tmp_path / "all/deep/b.gguf")
    assert found["b"].config.model_name == "b" == found["b"].config.served_as


def test_of_two_files_with_one_name_the_second_has_its_folder_in_its_name(tmp_path: Path) -> None:
    found = scan(folder(tmp_path, "q4/x.gguf", "q8/x.gguf"))
    assert set(found) == {"x", "q8/x"}
    assert found["q8/x"].config.model_name == "q8/x" and found["q8/x"].config.model.endswith("q8/x.gguf")


def test_what_a_model_needs_is_fixed_for_its_worker(tmp_path: Path) -> None:
    """Its engine does not choose by what happens to be free, so what it takes is what was reported."""
    found = scan(folder(tmp_path, "a.gguf"))["a"]
    file = gguf.read(str(tmp_path / "a.gguf"))
    options = found.config.llama
    assert (options.slots, options.context, options.fewer_slots) == (4, 4096, False)
    again = model_files.layout(options, file, 4 * GIB, 1)
    assert found.stored.needs == {RAM: again.need_bytes + model_files.embed_need(options, file, 4096)}


def test_a_small_budget_means_fewer_slots_and_then_a_smaller_context(tmp_path: Path) -> None:
    path = folder(tmp_path, "a.gguf")
    # 256 MiB to work in, 128 MiB and a cache of 4 MiB for embeddings, and 4 MiB of cache for each slot.
    assert scan(path, budget=400 * MIB)["a"].config.llama.slots == 2
    found = scan(path, budget=391 * MIB)["a"]
    assert (found.config.llama.slots, found.config.llama.context) == (1, 2048)
    assert found.stored.needs[RAM] <= 391 * MIB


def test_a_model_larger_than_the_budget_or_damaged_is_listed_with_the_reason(tmp_path: Path) -> None:
    path = folder(tmp_path, "a.gguf")
    (path / "b.gguf").write_bytes(b"GGUF")
    found = scan(path, budget=300 * MIB)
    assert "does not fit" in found["a"].stored.refusal and "damaged" in found["b"].stored.refusal


def test_hostile_names_and_files_hide_no_good_one(tmp_path: Path) -> None:
    folder(tmp_path, "a.gguf", "z.gguf", "\x1b[31mred\nline.gguf", "x" * 200 + ".gguf")
    (tmp_path / "z.gguf").rename(tmp_path / os.fsdecode(b"no-\xff-utf8.gguf"))
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    for name, target in (("loop", "loop.gguf"), ("endless", "/dev/zero"), ("memory", "/proc/self/mem")):
        (tmp_path / f"{name}.gguf").symlink_to(target)
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    (tmp_path / "counts.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**63 - 1, 2**63 - 1) + bytes(1000))
    (tmp_path / "array.gguf").write_bytes(head + struct.pack("<Q3sIIQ", 3, b"abc", 9, 8, 2**60) + bytes(64))
    lists = Catalogue((str(tmp_path),), LLAMA, Capacity({RAM: GIB}, {}))
    found = lists.scan()
    assert {name for name, each in found.items() if not each.stored.refusal} == {"a", "_[31mred_line", "x" * 128}
    assert set(found) - {"a", "_[31mred_line", "x" * 128} == {"no-_-utf8", "memory", "counts", "array"}
    assert "UTF-8" in found["no-_-utf8"].stored.refusal
    hosted = [m.HostedModel(name, note=each.stored.refusal) for name, each in found.items()]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(hosted), type=list[m.HostedModel]) == hosted
    assert all(printable(each.name + each.note) == each.name + each.note for each in hosted)


def test_what_is_left_out_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MODELS_PER_HOST", 2)
    folder(tmp_path, "a.gguf", "b.gguf", "c.gguf")
    lists = Catalogue((str(tmp_path),), LLAMA, Capacity({RAM: GIB}, {}))
    assert all(set(lists.scan()) == {"a", "b"} for _ in range(3))
    assert caplog.text.count("at most 2 models") == 1, "a disk would be full of it one day"


def test_what_accompanies_a_model_is_none(tmp_path: Path) -> None:
    tiny(tmp_path / "mmproj.gguf", more={"general.architecture": "clip"})
    assert scan(tmp_path) == {}


def test_adapters_in_a_folder_are_loaded_with_their_model_and_count(tmp_path: Path) -> None:
    path = folder(tmp_path, "other.gguf")
    plain = scan(path)["other"].stored
    (path / "base.gguf").write_bytes(tiny_model.whole())
    alone = scan(path)["base"].stored
    adapter = lora.write(path / "pirate.gguf", path / "base.gguf", 1)
    lists = Catalogue((str(path),), LLAMA, Capacity({RAM: 4 * GIB}, {RAM: 4 * GIB}))
    found = lists.scan()
    assert set(found) == {"base", "other"} and found["other"].stored == plain
    assert found["base"].config.adapters == (Adapter("pirate", str(adapter)),)
    assert found["base"].stored.adapters == ("pirate",)
    assert found["base"].stored.needs[RAM] == alone.needs[RAM] + adapter.stat().st_size
    # It is found when it appears, and missed when it is gone
    adapter.rename(path / "poet.gguf")
    assert lists.scan()["base"].stored.adapters == ("poet",)
    (path / "poet.gguf").unlink()
    assert lists.scan()["base"].stored == alone


def test_a_model_in_several_files_needs_all_of_them(tmp_path: Path) -> None:
    path = folder(tmp_path, "x-00001-of-00002.gguf", "x-00002-of-00002.gguf", "y.gguf")
    with (path / "x-00002-of-00002.gguf").open("ab") as file:
        file.write(bytes(MIB))
    found = scan(path)
    second = (path / "x-00002-of-00002.gguf").stat().st_size
    assert found["x-00001-of-00002"].stored.needs[RAM] == found["y"].stored.needs[RAM] + second
    assert len(found) == 2


def test_a_file_is_looked_at_again_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path, "a.gguf", "b.gguf")
    looked: list[str] = []
    read = gguf.read

    def watched(path: str) -> gguf.ModelFile:
        looked.append(Path(path).name)
        return read(path)

    monkeypatch.setattr(gguf, "read", watched)
    lists = Catalogue((str(path),), LLAMA, Capacity({RAM: GIB}, {}))
    first = lists.scan()
    assert lists.scan() == first and looked == ["a.gguf", "b.gguf"]
    os.utime(path / "b.gguf", ns=(1, 1))
    (path / "a.gguf").unlink()
    assert set(lists.scan()) == {"b"} and looked == ["a.gguf", "b.gguf", "b.gguf"]


def test_a_file_that_is_gone_hides_no_other(tmp_path: Path) -> None:
    folder(tmp_path, "a.gguf", "all/b.gguf")
    lists = Catalogue((str(tmp_path / "a.gguf"), str(tmp_path / "all")), LLAMA, Capacity({RAM: GIB}, {}))
    assert set(lists.scan()) == {"a", "b"}
    (tmp_path / "a.gguf").unlink()
    assert set(lists.scan()) == {"b"}


@pytest.mark.parametrize(("pooling", "kind"), [(None, "generate"), (1, "embed"), (4, "rerank")])
def test_the_kind_is_in_the_file(tmp_path: Path, pooling: int | None, kind: str) -> None:
    tiny(tmp_path / "a.gguf", more={} if pooling is None else {"llama.pooling_type": pooling})
    stored = scan(tmp_path)["a"].stored
    assert stored.kind == kind
    assert ("without a classifier" in stored.refusal) is (kind == "rerank"), "this file has no classifier"


def test_with_a_gpu_llama_cpp_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer of the dry run is made up; the real one needs a GPU."""
    asked: list[dict[str, int] | None] = []

    def answer(path: str, options: LlamaOptions, free: dict[str, int] | None = None) -> dry_run.Answer:
        asked.append(free)
        device = ComputeDevice("CUDA0", "a card", 24 * GIB, 24 * GIB)
        place = Placement((Share("CUDA0", 5, GIB, 24 * GIB),), 5, 2, host_bytes=MIB)
        return dry_run.Answer(placement=place if path else None, context=1024, devices=[device])

    monkeypatch.setattr(dry_run, "find_placement", answer)
    room = catalogue.capacity(LLAMA, 2 * GIB)
    assert room.budget == {RAM: 2 * GIB, "CUDA0": 24 * GIB - int(24 * GIB * 0.1)} and room.gpus
    found = Catalogue((str(folder(tmp_path, "a.gguf")),), LLAMA, room).scan()["a"]
    assert found.stored.needs == {RAM: MIB, "CUDA0": GIB}
    options = found.config.llama
    assert (options.slots, options.context, options.gpu_layers, options.fewer_slots) == (2, 1024, 5, False)
    assert asked[-1] == {RAM: 2 * GIB, "CUDA0": 24 * GIB}, "as free as at the start, whatever is loaded now"


def test_without_a_budget_it_is_what_is_free_but_for_a_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, budget in ((8 * GIB, 7 * GIB), (100 * GIB, 90 * GIB), (GIB // 2, 0)):
        monkeypatch.setattr("llambo.mesh.service.host.free_memory_bytes", lambda free=free: free)
        assert catalogue.capacity(FAKE, 0).budget == {RAM: budget}


def test_fake_models_have_a_size_a_kind_and_a_load_time() -> None:
    template = replace(FAKE, fake=replace(FAKE.fake, load_ms=7))
    found = scan("a:40", "b:10:embed:500ms", "c", template=template)
    seen = {
        each.stored.name: (each.stored.kind, each.stored.needs[RAM] // MIB, each.config.fake.load_ms)
        for each in found.values()
    }
    assert seen == {"a": ("generate", 40, 7), "b": ("embed", 10, 500), "c": ("generate", 0, 7)}
    assert found["a"].config.fake.memory_bytes == 40 * MIB and found["a"].config.model_name == "a"
    for text in ("a:b:c", ":4", "a:4:fast"):
        with pytest.raises(BadName, match="NAME:MIB"):
            scan(text, template=FAKE)


def test_what_is_not_there_at_the_start_is_a_mistake(tmp_path: Path) -> None:
    catalogue.check_names((str(tmp_path),), LLAMA)
    with pytest.raises(model_files.NoSuchModel):
        catalogue.check_names((str(tmp_path / "x.gguf"),), LLAMA)
