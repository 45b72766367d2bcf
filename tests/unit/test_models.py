"""Model files before they are loaded: errors in the file, memory layout, fingerprint."""

from __future__ import annotations

import os
import random
import struct
import tempfile
from pathlib import Path

import pytest

from llambo.worker.config import LlamaOptions, mesh_name
from llambo.worker.models import gguf, model_files
from llambo.worker.models.gguf import BadModelFile

MIB = 1024 * 1024


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(key: str, value: float | str | list[str]) -> bytes:
    if isinstance(value, float):
        return text(key) + struct.pack("<If", 6, value)
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        return text(key) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    return text(key) + struct.pack("<II", 4, value)


def tiny(path: Path, *, layers: int = 4, template: str = "", more: dict[str, float | str] | None = None) -> Path:
    """A whole GGUF file with one tensor, of a model with 1 KiB of cache for a token at f16."""
    entries: dict[str, float | str | list[str]] = {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.embedding_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 4,
        "llama.context_length": 8192,
        "tokenizer.ggml.tokens": [f"t{number}" for number in range(200)],
        "tokenizer.chat_template": template,
        **(more or {}),
    }
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(entries)) + b"".join(entry(k, v) for k, v in entries.items())
    head += text("weights") + struct.pack("<IQIQ", 1, 256, 0, 0)
    head += bytes(-len(head) % 32)
    path.write_bytes(head + bytes(1024))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny(tmp_path / "tiny.gguf")


def test_the_head_of_a_model_is_read(model: Path) -> None:
    file = gguf.read(str(model))
    assert (file.architecture, file.tensors, file.trained_context) == ("llama", 1, 8192)
    assert file.cell_bytes(2.0) == 4 * 4 * 32 * 2.0


@pytest.mark.parametrize("size", [0, 3, 10, 100, 2_000, -1])
def test_a_part_of_a_model_is_no_model(model: Path, size: int) -> None:
    whole = model.read_bytes()
    model.write_bytes(whole[:size])
    with pytest.raises(BadModelFile):
        gguf.read(str(model))


def test_another_file_is_named_for_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\3\4 a zip file")
    with pytest.raises(BadModelFile, match="is not a GGUF file"):
        gguf.read(str(path))


@pytest.mark.parametrize("seed", range(300))
def test_damage_is_an_error_or_does_no_harm(model: Path, seed: int) -> None:
    chance = random.Random(seed)
    data = bytearray(model.read_bytes())
    for _ in range(chance.randrange(1, 12)):
        data[chance.randrange(min(len(data), 600))] = chance.randrange(256)
    model.write_bytes(data)
    try:
        gguf.read(str(model)).cell_bytes(2.0)
    except BadModelFile as error:
        assert str(model) in str(error)  # noqa: PT017  # both outcomes are right


# --- layout ----------------------------------------------------------------------------------------------


def test_what_is_left_open_suits_model_and_machine(model: Path) -> None:
    file = gguf.read(str(model))
    layout = model_files.layout(LlamaOptions(), file, 2**40, cores=6)
    assert (layout.context, layout.threads) == (model_files.DEFAULT_CONTEXT, 6)
    # 4 slots of 4096 tokens need 16 MiB: with 10 MiB for them it is half of that
    small = model_files.layout(LlamaOptions(), file, model_files.WORK_BYTES + 10 * MIB, cores=6)
    assert small.context == model_files.DEFAULT_CONTEXT // 2


def test_slots_are_given_up_before_context(model: Path) -> None:
    """Answers move between workers with other numbers of slots, but not between other contexts."""
    file, free = gguf.read(str(model)), model_files.WORK_BYTES + 10 * MIB
    layout = model_files.layout(LlamaOptions(fewer_slots=True), file, free, cores=6)
    assert (layout.slots, layout.context) == (2, model_files.DEFAULT_CONTEXT)
    least = model_files.layout(LlamaOptions(fewer_slots=True), file, free - 7 * MIB, cores=6)
    assert (least.slots, least.context) == (1, model_files.DEFAULT_CONTEXT // 2)


def test_what_does_not_fit_is_refused_with_the_numbers_and_the_flag(model: Path) -> None:
    file = gguf.read(str(model))
    with pytest.raises(BadModelFile) as refused:
        model_files.layout(LlamaOptions(context=8192), file, model_files.WORK_BYTES + 10 * MIB, cores=2)
    assert "32 MiB of cache for 4 slots of 8192 tokens" in str(refused.value)
    assert "266 MiB are free; --ctx 2304 would fit" in str(refused.value)


def test_no_context_beyond_what_the_model_was_trained_for_is_proposed(model: Path) -> None:
    file = gguf.read(str(model))
    trained = file.trained_context
    with pytest.raises(BadModelFile, match=f"; --ctx {trained} would fit"):
        # There is room for more tokens than that, but not for so many
        model_files.layout(
            LlamaOptions(context=8 * trained),
            file,
            model_files.unchecked_layout(LlamaOptions(context=4 * trained), file, 0, 2).need_bytes,
            cores=2,
        )
    larger = model_files.unchecked_layout(LlamaOptions(context=2 * trained), file, 0, cores=2)
    assert f"was trained for {trained} tokens" in model_files.beyond_training(larger, file)
    assert not model_files.beyond_training(model_files.unchecked_layout(LlamaOptions(), file, 0, cores=2), file)


# --- fingerprint -----------------------------------------------------------------------------------------


def test_a_digest_is_remembered_until_the_file_changes(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "digests.json"
    first = model_files.digest(str(model), cache)
    cache.write_text(cache.read_text().replace(first, "remembered"))
    assert model_files.digest(str(model), cache) == "remembered"
    tiny(model, layers=5)
    assert model_files.digest(str(model), cache) not in (first, "remembered")


@pytest.mark.parametrize("junk", ["", "[]", "{", '{"a": 1}', "\0"])
def test_a_damaged_memory_of_digests_is_none(model: Path, tmp_path: Path, junk: str) -> None:
    cache = tmp_path / "digests.json"
    cache.write_text(junk)
    assert len(model_files.digest(str(model), cache)) == 64


def test_another_template_or_context_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one, other = (gguf.read(str(tiny(tmp_path / f"{name}.gguf", template=name))) for name in "ab")
    prints = {model_files.fingerprint(one, 4096, "f16"), model_files.fingerprint(one, 2048, "f16"),
              model_files.fingerprint(one, 4096, "q8_0"), model_files.fingerprint(other, 4096, "f16")}  # fmt: skip
    assert len(prints) == 4


def test_names() -> None:
    assert mesh_name("smollm2") == "smollm2"
    assert mesh_name("/models/Qwen3-0.6B-Q8_0.gguf") == "Qwen3-0.6B-Q8_0"


@pytest.mark.parametrize(
    ("what", "reason"), [("x.gguf", "it may not be read"), ("", "its folder {} may not be entered")]
)
def test_a_file_that_this_user_may_not_read_is_named_with_the_reason(what: str, reason: str) -> None:
    before = os.geteuid()
    # That of pytest is closed to others already.
    with tempfile.TemporaryDirectory() as top:
        Path(top).chmod(0o755)
        folder = Path(top, "models")
        folder.mkdir()
        model = tiny(folder / "x.gguf")
        (folder / what).chmod(0)
        try:
            if before == 0:
                os.seteuid(65_534)  # permissions do not hold for root
            with pytest.raises(model_files.NoSuchModel) as refused:
                model_files.find(str(model))
        finally:
            os.seteuid(before)
            folder.chmod(0o755)
    assert str(refused.value).startswith(f"cannot read {model}: {reason.format(folder)} by the user ")
    assert "may read it" in refused.value.hint
