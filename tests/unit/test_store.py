"""Names of models, the choice of files, parts of downloads, and what is removed from a cache."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llambo.cli.kit.common import asked_model
from llambo.cli.kit.failure import Exit
from llambo.cli.services.up import MeshCommands
from llambo.mesh.settings import settings
from llambo.mesh.wire.errors import LlamboError
from llambo.worker.config import RAM, WorkerConfig
from llambo.worker.host import catalogue
from llambo.worker.host.catalogue import Capacity, Catalogue
from llambo.worker.llama import binding
from llambo.worker.models import model_files
from llambo.worker.models.model_files import NoSuchModel
from llambo.worker.store import caches, part_file, refs
from llambo.worker.store.caches import OllamaLayer, OllamaManifest
from llambo.worker.store.part_file import PartFile
from llambo.worker.store.refs import HubRef, OllamaRef, StoreError, UrlRef
from tests.unit.test_cli import llambo
from tests.unit.test_models import tiny

SHA = "0123456789abcdef" * 4


# --- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("hf:org/repo", HubRef("org/repo")),
        ("hf:org/re.po-1:Q4_K_M", HubRef("org/re.po-1", quant="Q4_K_M")),
        ("hf:org/repo/sub/x.gguf", HubRef("org/repo", file="sub/x.gguf")),
        ("https://huggingface.co/org/repo/resolve/main/a%20b.gguf?download=true", HubRef("org/repo", file="a b.gguf")),
        ("https://hf.co/org/repo/blob/main/sub/x.gguf", HubRef("org/repo", file="sub/x.gguf")),
        ("ollama:llama3.2", OllamaRef("llama3.2")),
        ("ollama:llama3.2:1b", OllamaRef("llama3.2", "1b")),
        ("ollama:me/tiny:x", OllamaRef("tiny", "x", "me")),
        ("ollama:box:5000/me/tiny", OllamaRef("tiny", "latest", "me", "box:5000")),
        ("https://h/p/x.gguf?token=1", UrlRef("https://h/p/x.gguf?token=1")),
        (f"http://h/x.gguf#sha256={SHA}", UrlRef("http://h/x.gguf", SHA)),
        ("http://127.0.0.1:8/x.gguf", UrlRef("http://127.0.0.1:8/x.gguf")),
        ("~/models/x.gguf", None),
        ("smollm2", None),
    ],
)
def test_names(text: str, ref: refs.Ref | None) -> None:
    assert refs.parse(text) == ref
    if ref is not None:
        assert refs.parse(str(ref)) == ref


@pytest.mark.parametrize(
    "text",
    [
        "hf:", "hf:org", "hf:org/", "hf:../repo", "hf:org/..", "hf:org/a..b", "hf:org/re--po", "hf:org/repo:",
        "hf:org/repo/../x.gguf", "hf:org/repo//x.gguf", "hf:org/repo/x.bin", "hf:org/repo:Q4/x.gguf", "hf:org/repo/",
        "hf:org/repo/a\\b.gguf", "hf:org/repo/a\x1b.gguf", "hf:org/" + "x" * 2000, "ollama:", "ollama:..",
        "ollama:a/b/c/d", "ollama:../x:y", "ollama:x:", "ollama:a:..", "https://", "https://h/x.bin", "https://h/.gguf/",
        "hf:org/re po", "https:///x.gguf", "https://u:p@h/x.gguf", "https://h:99999/x.gguf", "http://h/x.gguf", "https://h/x.gguf#sha256=12",
        "https://h/..%2f..%2fx.txt", f"https://h/x-00001-of-00002.gguf#sha256={SHA}", "https://[/x.gguf",
    ],
)  # fmt: skip
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(StoreError) as caught:
        refs.parse(text)
    assert "u:p" not in f"{caught.value} {caught.value.hint}"


def test_a_path_of_a_server_stays_below_its_folder() -> None:
    assert refs.is_safe_path("a/b.gguf") and refs.is_safe_path("..a/.b")
    for path in (
        "",
        "/a",
        "a//b",
        "a/../b",
        "..",
        "./a",
        "a\\b",
        "a\0b",
        "a/" + "x" * 300,
        "é" * 200,
        "a/" * 600 + "b",
    ):
        assert not refs.is_safe_path(path), path


@given(
    st.sampled_from(["hf:", "ollama:", "https://", "http://127.0.0.1/", "hf:o/", "ollama:o/r:", "https://hf.co/o/r/"]),
    st.text(st.sampled_from("ab./\\:@#%2e\x1bé-_ ") | st.characters(), max_size=30),
    st.sampled_from(["", ".gguf", "/x.gguf", ":Q4"]),
)
def test_whatever_the_name_is_its_files_are_in_a_cache(scheme: str, middle: str, end: str) -> None:
    try:
        ref = refs.parse(scheme + middle + end)
    except StoreError:
        return
    match ref:
        case HubRef(repo, _, file):
            path, top = caches.repo_folder(repo) / "snapshots" / "c" / (file or "x"), caches.hub_folder()
        case OllamaRef():
            path, top = caches.manifest_path(ref, caches.ollama_folder()), caches.ollama_folder()
        case UrlRef():
            path, top = caches.url_file(ref), caches.own_folder()
        case None:
            raise AssertionError(scheme)
    assert Path(os.path.normpath(path)) == path and path.is_relative_to(top) and len(path.parts) > len(top.parts) + 1


QWEN = [
    "README.md", "imatrix.gguf", "mmproj-Q4_K_M.gguf", "mtp-x-Q4_K_M.gguf", "q/Qwen-Q8_0-00001-of-00002.gguf",
    "q/Qwen-Q8_0-00002-of-00002.gguf", "qwen-IQ4_XS.gguf", "qwen-Q4_K_M.gguf", "qwen-q5_k_m.gguf",
]  # fmt: skip


@pytest.mark.parametrize(
    ("paths", "name", "chosen"),
    [
        (QWEN, "hf:o/r", ["qwen-Q4_K_M.gguf"]),
        (QWEN, "hf:o/r:q4_k_m", ["qwen-Q4_K_M.gguf"]),
        (QWEN, "hf:o/r:Q5_K_M", ["qwen-q5_k_m.gguf"]),
        (QWEN, "hf:o/r:Q8_0", QWEN[4:6]),
        (QWEN, "hf:o/r/Q/qwen-q8_0-00001-of-00002.GGUF", QWEN[4:6]),
        (QWEN, "hf:o/r/mmproj-Q4_K_M.gguf", ["mmproj-Q4_K_M.gguf"]),
        (["b-Q8_0.gguf", "a-F16.gguf"], "hf:o/r", ["b-Q8_0.gguf"]),
        (["b-F16.gguf", "a-F32.gguf"], "hf:o/r", ["a-F32.gguf"]),
    ],
)
def test_the_choice_of_files(paths: list[str], name: str, chosen: list[str]) -> None:
    ref = refs.parse(name)
    assert isinstance(ref, HubRef)
    assert refs.choose(random.Random(1).sample(paths, len(paths)), ref) == chosen


@pytest.mark.parametrize(
    ("paths", "name", "text"),
    [
        (QWEN, "hf:o/r:Q4_K", "there are: q/Qwen-Q8_0-00001-of-00002.gguf, qwen-IQ4_XS.gguf"),
        (QWEN, "hf:o/r/other.gguf", "no file of that name; there are: "),
        (["model.safetensors", "mmproj.gguf"], "hf:o/r", "it has no GGUF file that is a model"),
        ([QWEN[4]], "hf:o/r", "1 of 2 parts are missing, such as q/Qwen-Q8_0-00002-of-00002.gguf"),
    ],
)
def test_what_cannot_be_chosen(paths: list[str], name: str, text: str) -> None:
    ref = refs.parse(name)
    assert isinstance(ref, HubRef)
    with pytest.raises(StoreError) as caught:
        refs.choose(paths, ref)
    assert text in str(caught.value)


def test_parts_of_a_url() -> None:
    parts = UrlRef("https://h/d/x-00001-of-00003.gguf?k=1").parts()
    assert [part.url for part in parts] == [f"https://h/d/x-0000{number}-of-00003.gguf?k=1" for number in (1, 2, 3)]
    assert len({caches.url_file(part).parent for part in parts}) == 1


def test_a_url_in_a_message_shows_no_secret() -> None:
    assert refs.shown("https://u:p@h:1/x.gguf?token=t#f") == "https://h:1/x.gguf"


# --- names of this host ------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "OLLAMA_MODELS",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(caches, "OLLAMA_SERVICE", tmp_path / "service")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_hub(home: Path, name: str, commit: str = "a" * 40, blob: str = SHA) -> Path:
    """A file as huggingface_hub stores it."""
    folder = home / ".cache/huggingface/hub/models--o--r"
    for each in ("blobs", "refs", f"snapshots/{commit}/{name}/.."):
        (folder / each).resolve().mkdir(parents=True, exist_ok=True)
    if not (folder / "blobs" / blob).exists():
        tiny(folder / "blobs" / blob)
    (folder / "refs/main").write_text(commit)
    link = folder / "snapshots" / commit / name
    link.symlink_to(Path(*[".."] * (1 + len(Path(name).parts)), "blobs", blob))
    return link


def in_ollama(folder: Path, tag: str, blob: bytes = b"x", more: bytes = b"template") -> Path:
    layers = []
    for kind, content in ((caches.OLLAMA_MODEL, blob), ("application/vnd.ollama.image.template", more)):
        layer = OllamaLayer(kind, f"sha256:{hashlib.sha256(content).hexdigest()}", len(content))
        path = caches.ollama_blob(folder, layer)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        layers.append(layer)
    manifest = caches.manifest_path(OllamaRef("tiny", tag), folder)
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_bytes(msgspec.json.encode(OllamaManifest(layers)))
    return caches.ollama_blob(folder, layers[0])


def test_what_names_stand_for(home: Path) -> None:
    path = in_hub(home, "tiny-Q8_0.gguf")
    aliases = {"small": "hf:o/r", "mine": "~/mine.gguf", "gone": "hf:o/none"}
    tiny(home / "mine.gguf")
    blob = in_ollama(home / "service", "1b", b"GGUF")
    assert model_files.resolve("hf:o/r:q8_0") == model_files.Named(str(path), path, "tiny-Q8_0")
    assert model_files.resolve("small", aliases).served_as == "small"
    assert model_files.resolve("mine", aliases) == model_files.Named("~/mine.gguf", home / "mine.gguf", "mine")
    assert model_files.resolve("ollama:tiny:1b") == model_files.Named(str(blob), blob, "tiny:1b")
    for name in ("gone", "hf:o/r:Q2_K", "ollama:tiny", "https://h/x.gguf"):
        with pytest.raises(NoSuchModel) as caught:
            model_files.resolve(name, aliases)
        assert caught.value.hint == f"llambo pull {aliases.get(name, name)}   downloads it"
    listed = {each.model: each.where for each in model_files.on_this_host(aliases=aliases)}
    assert listed.items() >= {"small": "llambo.toml", "mine": "llambo.toml", "ollama:tiny:1b": "Ollama"}.items()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"layers": 1}', b'{"layers": [{"mediaType": "x"}]}'])
def test_a_damaged_manifest_is_no_model(home: Path, content: bytes) -> None:
    in_ollama(home / ".ollama/models", "1b")
    manifest = caches.manifest_path(OllamaRef("tiny", "1b"), home / ".ollama/models")
    manifest.write_bytes(content)
    assert caches.find(OllamaRef("tiny", "1b")) is None and not list(caches.listed())
    bad = OllamaLayer(caches.OLLAMA_MODEL, "sha256:../../../etc/passwd", 1)
    manifest.write_bytes(msgspec.json.encode(OllamaManifest([bad])))
    assert caches.find(OllamaRef("tiny", "1b")) is None


def test_aliases_are_read_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "llambo.toml"
    file.write_text('[models]\nqwen = "hf:o/r:Q4_K_M"\n[broker]\nport = 7331\n')
    loaded = settings.load({}, config=str(file), environ={})
    assert loaded.aliases == {"qwen": "hf:o/r:Q4_K_M"} and loaded.number("port") == 7331
    assert ("models.qwen", "hf:o/r:Q4_K_M", str(file)) in loaded.rows()
    for text in ("models = 1", "[models]\nx = 1", "[models]\nx = ''", "[models]\n'a:b' = 'x'", "[models]\n'a@b' = 'x'"):
        file.write_text(text)
        with pytest.raises(LlamboError, match="models"):
            settings.load({}, config=str(file), environ={})


# --- parts of downloads ----------------------------------------------------------------------------------------


def part(path: Path, size: int, identity: str = SHA) -> PartFile:
    return PartFile(path / "x.part", size, identity)


@pytest.mark.parametrize("seed", range(20))
def test_a_part_goes_on_from_chunks_that_are_right(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a crash leaves of the two files, what is taken from them is the beginning of the file to be."""
    monkeypatch.setattr(part_file, "CHUNK_BYTES", 100)
    chance = random.Random(seed)
    content = chance.randbytes(1_050)
    written = chance.randrange(1_051)
    with part(tmp_path, 1_050) as file:
        file.resume()
        while file.size < written:
            file.write(content[file.size : min(written, file.size + chance.randrange(1, 300))])
    for name in ("x.part", "x.part.sums"):
        path = tmp_path / name
        if (what := chance.randrange(3)) == 1:
            path.write_bytes(path.read_bytes()[: chance.randrange(len(path.read_bytes()) + 1)])
        elif what == 2 and path.stat().st_size:
            damaged = bytearray(path.read_bytes())
            damaged[chance.randrange(len(damaged))] ^= 1
            path.write_bytes(damaged)
    with part(tmp_path, 1_050) as file:
        file.resume()
        assert file.size % 100 == 0 or file.size == 1_050
        assert (tmp_path / "x.part").read_bytes() == content[: file.size]
        file.write(content[file.size :])
    with part(tmp_path, 1_050) as file:
        file.resume()
        assert file.size == 1_050


def test_a_part_of_another_file_is_discarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_file, "CHUNK_BYTES", 100)
    with part(tmp_path, 1_000) as file:
        file.resume()
        file.write(b"x" * 500)
    for size, identity in ((1_000, "another"), (999, SHA)):
        with part(tmp_path, size, identity) as file:
            file.resume()
            assert file.size == 0
            file.write(b"x" * 500)


# --- removing ----------------------------------------------------------------------------------------------------


def left(home: Path) -> set[str]:
    return {str(path.relative_to(home)) for path in home.rglob("*") if not path.is_dir() or not any(path.iterdir())}


def test_a_model_is_removed_and_what_others_have_stays(home: Path) -> None:
    in_hub(home, "a-Q8_0.gguf", "a" * 40, "1" * 64)
    in_hub(home, "a-Q8_0.gguf", "b" * 40, "2" * 64)
    kept = in_hub(home, "b-F16.gguf", "b" * 40, "3" * 64)
    same = in_hub(home, "copy-F16.gguf", "b" * 40, "2" * 64)
    found = caches.removal(HubRef("o/r", quant="Q8_0"))
    caches.remove(found)
    folder = home / ".cache/huggingface/hub/models--o--r"
    assert [path.name for path in found.files] == ["1" * 64] and [path.name for path in found.shared] == ["2" * 64]
    assert kept.is_file() and same.is_file() and (folder / "refs/main").read_text() == "b" * 40
    assert not (folder / "snapshots" / ("a" * 40)).exists()
    (folder / "blobs" / f"{SHA}.part").write_bytes(b"x")
    for name in ("b-F16.gguf", "copy-F16.gguf"):
        caches.remove(caches.removal(HubRef("o/r", file=name)))
    assert left(home) == {".cache/huggingface/hub"}


def test_a_model_of_ollama_is_removed_without_the_layers_of_others(home: Path) -> None:
    folder = home / ".ollama/models"
    gone, kept = in_ollama(folder, "1b", b"GGUF1"), in_ollama(folder, "2b", b"GGUF2")
    found = caches.removal(OllamaRef("tiny", "1b"))
    assert (found.size, len(found.shared)) == (5, 1)
    caches.remove(found)
    assert not gone.exists() and kept.exists() and caches.find(OllamaRef("tiny", "2b")) == kept
    caches.manifest_path(OllamaRef("tiny", "3b"), folder).write_bytes(b"a format of tomorrow")
    caches.remove(caches.removal(OllamaRef("tiny", "2b")))
    assert kept.exists(), "what a manifest that cannot be read refers to is unknown"


def test_rm_asks_and_touches_no_other_file(home: Path) -> None:
    path = in_hub(home, "tiny-Q8_0.gguf")
    asked = llambo("rm", "hf:o/r")
    assert asked.exit_code == Exit.USAGE and "llambo rm --yes hf:o/r" in asked.stderr and path.exists()
    done = llambo("rm", "--yes", str(path))
    assert done.exit_code == Exit.OK and f"removed {path}: 1 file, " in done.stdout and not path.exists()
    assert llambo("rm", "--yes", "hf:o/r").exit_code == Exit.ERROR

    mine, notes = tiny(home / "mine.gguf"), home / "notes.txt"
    notes.write_text("x")
    for words, exists in (([str(mine)], True), (["--yes", str(notes)], True), (["--yes", "smollm2"], True)):
        assert llambo("rm", *words).exit_code == Exit.USAGE
        assert mine.exists() == exists and notes.exists()
    assert llambo("rm", "--yes", "mine.gguf").exit_code == Exit.OK and not mine.exists()


def test_a_model_that_is_not_here_is_an_error_with_the_command_that_helps(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binding, "missing", lambda library="": "")
    for words in (["models", "hf:o/r:Q4_K_M"], ["worker", "--model", "hf:o/r:Q4_K_M"], ["up", "hf:o/r:Q4_K_M"]):
        done = llambo(*words)
        assert done.exit_code == Exit.ERROR and "llambo pull hf:o/r:Q4_K_M" in done.stderr, done.stderr
    done = llambo("pull", "x.gguf")
    assert done.exit_code == Exit.USAGE and "hf:ORG/REPO" in done.stderr
    done = llambo("pull", "hf:o")
    assert done.exit_code == Exit.USAGE, done.stderr


@pytest.mark.parametrize(
    "words",
    [["pull"], ["rm", "--yes"], ["models"], ["up"], ["up", "--models"], ["worker", "--model"], ["worker", "--models"]],
    ids=" ".join,
)
def test_what_is_no_name_of_any_model_is_wrong_usage_of_every_command(
    home: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr(binding, "missing", lambda library="": "")
    for name in ("hf:a/../b", "hf:o", "ollama:../x", "https://", "https://h/x.txt"):
        done = llambo(*words, name)
        assert done.exit_code == Exit.USAGE, (name, done.stderr)


def test_up_without_a_model_serves_what_is_here_and_what_comes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "missing", lambda library="": "")
    monkeypatch.setattr(model_files, "packaged", lambda model: None)
    started: list[MeshCommands] = []

    async def run(made: MeshCommands) -> int:
        started.append(made)
        return 0

    monkeypatch.setattr("llambo.cli.services.up.run", run)
    assert llambo("up").exit_code == llambo("up", "--models", "all").exit_code == Exit.OK
    in_hub(home, "tiny-Q8_0.gguf")
    assert llambo("up").exit_code == Exit.OK
    assert [made.no_model for made in started] == [True, True, False]
    for made in started:
        (_, command), *others = made.workers
        assert made.on_demand and command[command.index("--models") + 1] == "all" and not others
    # What is asked for by name, or several times, is not replaced by all
    for words in (["--workers", "2"], ["--model", "hf:o/none"]):
        done = llambo("up", *words)
        assert done.exit_code == Exit.ERROR and "llambo " in done.stderr, done.stderr
    assert len(started) == 3


def test_all_is_each_model_of_this_machine_under_its_name_in_a_mesh(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What appears later is found by the next look."""
    monkeypatch.setattr(model_files, "packaged", lambda model: None)
    (home / "cwd").mkdir()
    monkeypatch.chdir(home / "cwd")
    aliases = {"mine": str(home / "x/called.gguf")}
    room = Capacity({RAM: 2**32}, {})
    lists = Catalogue((catalogue.ALL,), WorkerConfig(engine="llama"), room, aliases, str(home / "more"))
    assert lists.scan() == {} and not catalogue.has_model((catalogue.ALL,), aliases, str(home / "more"))
    for name in ("x/called.gguf", "models/home.gguf", "more/set.gguf"):
        (home / name).parent.mkdir()
        tiny(home / name)
    in_hub(home, "tiny-Q8_0.gguf")
    in_ollama(home / ".ollama/models", "1b", tiny(home / "blob").read_bytes())
    assert sorted(lists.scan()) == ["home", "mine", "set", "tiny-Q8_0", "tiny:1b"]
    assert catalogue.has_model((catalogue.ALL,))
    assert not catalogue.is_all("./all", {}) and not catalogue.is_all("all", {"all": "hf:o/r"})


def test_a_worker_without_a_model_names_those_that_are_here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "missing", lambda library="": "")
    monkeypatch.setattr(model_files, "packaged", lambda model: None)
    bare = llambo("worker")
    assert bare.exit_code == Exit.ERROR and "llambo-worker --model FILE.gguf" in bare.stderr, bare.stderr
    in_hub(home, "tiny-Q8_0.gguf")
    done = llambo("worker")
    assert done.exit_code == Exit.ERROR and "llambo-worker --model hf:o/r/tiny-Q8_0.gguf" in done.stderr, done.stderr
    assert "FILE.gguf" not in done.stderr and "no model is named" in done.stderr


def test_commands_ask_for_a_download_by_the_name_that_it_has_in_the_mesh(home: Path) -> None:
    """No person types the name that a worker has made of it. A mesh may have it although this machine does not."""
    in_hub(home, "tiny-Q8_0.gguf")
    in_ollama(home / "service", "1b", b"GGUF")
    for name, asked in (("hf:o/r", "tiny-Q8_0"), ("hf:o/r:q8_0", "tiny-Q8_0"), ("ollama:tiny:1b", "tiny:1b"),
                        ("hf:o/none", "hf:o/none"), ("small", "small"), ("", "")):  # fmt: skip
        assert asked_model(name) == asked
