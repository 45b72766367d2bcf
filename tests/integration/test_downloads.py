"""Downloads from a server on loopback that speaks the hub's protocol, and Ollama's: whole, or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import tiny_model
from llambo.testing.commands import ROOT
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.store import caches, chunk_sums, part_file, pull, refs, web
from llambo.worker.store.refs import StoreError
from tests.integration.hub import Hub, serving, sha256
from tests.integration.puller import Puller

MIB = 1024 * 1024
REPO, FILE = "org/tiny-GGUF", "tiny-Q4_K_M.gguf"
NAME = f"hf:{REPO}"


class Watcher:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def moved(self, count: int) -> None:
        self.done += count

    def verified(self, path: Path, sha256: str) -> None:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def big(size: int) -> bytes:
    """Not a model that could be loaded, but one that begins like one."""
    return b"GGUF" + random.Random(size).randbytes(size - 4)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub(repos={REPO: {FILE: tiny_model.whole(), "README.md": b"#"}})) as hub:
        yield hub


@pytest.fixture(autouse=True)
def home(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and no pauses between tries."""
    for variable in list(os.environ):
        if variable.startswith(("HF_", "HUGGING", "OLLAMA_", "XDG_CACHE")) or variable.lower().endswith("_proxy"):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(caches, "OLLAMA_SERVICE", tmp_path / "no-service")
    monkeypatch.setattr(web, "PAUSE_MS", (0, 0))
    return tmp_path


def ref_of(name: str) -> refs.Ref:
    ref = refs.parse(name)
    assert ref is not None
    return ref


def bring(name: str = NAME, watcher: Watcher | None = None) -> Path:
    ref, watcher = ref_of(name), watcher or Watcher()
    return pull.carry_out(pull.plan(ref, watcher), ref, watcher)


def refusal(name: str = NAME) -> StoreError:
    """And nothing can be seen of the model."""
    with pytest.raises(StoreError) as caught:
        bring(name)
    assert caches.find(ref_of(name)) is None
    return caught.value


def everything(home: Path) -> dict[str, int]:
    """The files below the home that are no locks."""
    found = {path: path.lstat().st_size for path in home.rglob("*") if not path.is_dir() and path.suffix != ".lock"}
    return {str(path.relative_to(home)): size for path, size in found.items()}


def in_hub(home: Path) -> Path:
    return home / ".cache/huggingface/hub/models--org--tiny-GGUF"


# --- it works --------------------------------------------------------------------------------------------


def test_a_model_is_in_the_cache_as_other_programs_write_it(hub: Hub, home: Path) -> None:
    path = bring()
    content, folder = tiny_model.whole(), in_hub(home)
    assert path == folder / "snapshots" / hub.commit / FILE
    assert path.read_bytes() == content
    assert str(path.readlink()) == f"../../blobs/{sha256(content)}"
    assert (folder / "refs/main").read_text() == hub.commit
    assert len(everything(home)) == 3, "and nothing else"
    assert caches.find(ref_of(NAME)) == path

    bring()
    assert len(hub.bodies()) == 1, "what is here is not downloaded again"


def test_a_new_state_of_the_repository_is_a_new_snapshot(hub: Hub, home: Path) -> None:
    old = bring()
    hub.commit, hub.repos[REPO][FILE] = "d" * 40, tiny_model.whole() + b"new"
    new = bring()
    assert new != old and old.is_file() and caches.find(ref_of(NAME)) == new
    names = {str(ref): path for ref, path, _ in caches.listed()}
    assert set(names) == {f"{NAME}/{FILE}"}


def test_a_list_of_files_may_have_pages(hub: Hub) -> None:
    hub.page = 1
    assert bring().read_bytes() == tiny_model.whole()


def test_a_model_in_parts_is_there_when_all_parts_are(hub: Hub, home: Path) -> None:
    hub.repos[REPO] = {f"Q8_0/big-Q8_0-{number:05}-of-00003.gguf": big(1000 + number) for number in (1, 2, 3)}
    hub.cut = lambda: 0 if len(hub.bodies()) > 2 else None
    assert "tries have failed" in str(refusal())
    assert not list((in_hub(home)).glob("snapshots/*"))
    hub.cut = lambda: None
    assert bring().name == "big-Q8_0-00001-of-00003.gguf"
    assert len(list(in_hub(home).glob("snapshots/*/Q8_0/*"))) == 3


def test_a_model_of_ollama_is_in_its_store(hub: Hub, home: Path) -> None:
    layers = {
        "application/vnd.docker.container.image.v1+json": b"{}",
        caches.OLLAMA_MODEL: tiny_model.whole(),
        "application/vnd.ollama.image.license": b"MIT",
    }
    hub.ollama["library/tiny:1b"] = layers
    name = f"ollama:{hub.url.removeprefix('http://')}/library/tiny:1b"
    path = bring(name)
    assert path == home / f".ollama/models/blobs/sha256-{sha256(tiny_model.whole())}"
    assert path.read_bytes() == tiny_model.whole()
    assert len(list((home / ".ollama/models/blobs").iterdir())) == 3
    assert [str(ref) for ref, _, _ in caches.listed()] == [name]
    assert refusal(name.replace("1b", "7b")).status == 404


def test_a_file_with_a_url(hub: Hub, home: Path) -> None:
    hub.files["/files/tiny.gguf"] = tiny_model.whole()
    name = f"{hub.url}/files/tiny.gguf"
    path = bring(name)
    assert path.name == "tiny.gguf" and path.read_bytes() == tiny_model.whole()
    assert [str(ref) for ref, _, _ in caches.listed()] == [name]
    checked = f"{name}#sha256={sha256(tiny_model.whole())}"
    assert bring(checked) != path, "what is here without a checksum does not count as checked"
    assert "wrong bytes" in str(refusal(f"{name}#sha256={'0' * 64}"))
    for each in (name, checked):
        caches.remove(caches.removal(ref_of(each)))
    assert everything(home) == {}


# --- the connection ------------------------------------------------------------------------------------------


def test_a_download_that_is_cut_again_and_again(hub: Hub) -> None:
    content = hub.repos[REPO][FILE] = big(9 * MIB + 1)
    chance, cuts = random.Random(5), 0

    def cut() -> int | None:
        nonlocal cuts
        cuts += 1
        return chance.randrange(100_000, 500_000) if cuts <= 20 else None

    hub.cut, watcher = cut, Watcher()
    assert bring(watcher=watcher).read_bytes() == content
    assert cuts == 21 and len(watcher.notes) == 20
    assert hub.sent == watcher.done == len(content), "each byte once"


def test_a_process_that_is_killed_again_and_again(hub: Hub, home: Path) -> None:
    """The kill comes while a body is on its way, after any number of bytes."""
    content = hub.repos[REPO][FILE] = big(40 * MIB)
    chance, kills, release = random.Random(7), 20, threading.Event()
    sent: list[int] = []

    def cut() -> int:
        sent.append(chance.randrange(6 * MIB))
        return sent[-1]

    hub.cut, hub.on_cut = cut, lambda: bool(release.wait(TIMEOUT_S))
    puller = Puller(home, HF_ENDPOINT=hub.url)
    try:
        for _ in range(kills):
            release.clear()
            pid = puller.begin(NAME)
            puller.until("moved")  # what was there
            received = 0
            while not sent or received < sent[-1]:
                received += puller.until("moved")
            sent.clear()
            os.kill(pid, signal.SIGKILL)
            assert puller.until("ended") == signal.SIGKILL
            release.set()
            names = set(everything(home))
            assert all(".part" in name for name in names), names
            assert caches.find(ref_of(NAME)) is None
        hub.cut = lambda: None
        assert Path(puller.pull(NAME)["path"]).read_bytes() == content
    finally:
        release.set()
        puller.close()
    starts = hub.starts()
    assert len(starts) == kills + 1 and starts == sorted(starts) and starts[-1] > 8 * MIB
    assert all(start % chunk_sums.CHUNK_BYTES == 0 for start in starts)
    assert len(everything(home)) == 3


def test_two_processes_download_a_file_once(hub: Hub, home: Path) -> None:
    """The second waits for the first; when that is killed, it goes on with what is there."""
    content = hub.repos[REPO][FILE] = big(20 * MIB)
    reached, release = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        assert release.wait(TIMEOUT_S)

    hub.on_cut, hub.cut = hold, lambda: None if reached.is_set() else 9 * MIB
    first, second = Puller(home, HF_ENDPOINT=hub.url), Puller(home, HF_ENDPOINT=hub.url)
    try:
        pid = first.begin(NAME)
        assert reached.wait(TIMEOUT_S)
        second.begin(NAME)
        assert "another process downloads" in second.until("note")
        os.kill(pid, signal.SIGKILL)
        assert Path(second.until("path")).read_bytes() == content
    finally:
        release.set()
        first.close()
        second.close()
    assert hub.starts() == [0, 8 * MIB]


def test_a_server_without_ranges(hub: Hub) -> None:
    content = hub.repos[REPO][FILE] = big(3 * MIB)
    hub.ranges = False
    hub.cut = lambda: 2 * MIB if len(hub.bodies()) == 1 else None
    assert bring().read_bytes() == content


def test_a_redirect_to_another_host_does_not_get_the_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.token = "hf_secret"
    with serving(Hub(repos=hub.repos)) as other:
        hub.elsewhere = other.url
        assert bring().read_bytes() == tiny_model.whole()
        assert other.requests and all("Authorization" not in each.headers for each in other.requests)
    assert all(each.headers["Authorization"] == "Bearer hf_secret" for each in hub.requests)


def test_a_token_for_this_machine_does_not_go_to_a_proxy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(Hub()) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert bring().is_file() and not proxy.requests
        monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
        assert "404" in str(refusal("hf:org/none")), "elsewhere it is used, without the token"
        assert proxy.requests and all("Authorization" not in each.headers for each in proxy.requests)


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://[", "//", "/org/tiny-GGUF/resolve/x"]
)
def test_redirects_that_lead_nowhere(hub: Hub, target: str) -> None:
    hub.refusals = [(302, {"Location": target})] * 10
    assert "lead" in str(refusal())


# --- refusals ----------------------------------------------------------------------------------------------------


def test_a_repository_that_is_not_there(hub: Hub) -> None:
    error = refusal("hf:org/none")
    assert error.status == 404 and f"{hub.url}/org/none" in error.hint


def test_a_quantisation_that_is_not_there_is_an_error_that_names_those_that_are(hub: Hub) -> None:
    assert f"there are: {FILE}" in str(refusal(f"{NAME}:Q2_K"))


@pytest.mark.parametrize("given", ["", "hf_wrong"])
def test_terms_that_are_not_accepted(hub: Hub, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", given)
    hub.token = "hf_right"
    error = refusal()
    assert error.status == 401 and hub.url in error.hint
    assert ("the token is not accepted" in str(error)) == bool(given) and ("HF_TOKEN" in error.hint) == (not given)
    assert not given or given not in f"{error} {error.hint}"
    hub.refusals = [(403, {})]
    assert refusal().status == 403


@pytest.mark.parametrize("place", ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "home"])
def test_a_token_comes_from_the_usual_places(hub: Hub, home: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_right"
    file = home / {"HF_TOKEN_PATH": "mine", "HF_HOME": "hf/token"}.get(place, ".cache/huggingface/token")
    file.parent.mkdir(parents=True, exist_ok=True)
    if place == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", "hf_right")
    else:
        file.write_text("hf_right\n")
    if place == "HF_TOKEN_PATH":
        monkeypatch.setenv(place, str(file))
    elif place == "HF_HOME":
        monkeypatch.setenv(place, str(file.parent))
    assert bring().is_file()


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_that_is_busy_is_asked_again(hub: Hub, status: int) -> None:
    hub.refusals = [(status, {"Retry-After": "0"})] * 3
    watcher = Watcher()
    assert bring(watcher=watcher).is_file()
    assert len(watcher.notes) == 3 and str(status) in watcher.notes[0]


def test_a_server_that_stays_busy(hub: Hub) -> None:
    hub.refusals = [(503, {})] * 100
    error = refusal()
    assert f"answers 503; {web.TRIES} tries have failed" in str(error) and "again later" in error.hint
    assert len(hub.requests) == web.TRIES
    hub.refusals = [(429, {"Retry-After": "3600"})]
    assert "it asks to wait 3600 s; 1 tries" in str(refusal())


def test_a_server_that_sends_no_more(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "TIMEOUT_S", 0.1)
    release = threading.Event()
    hub.cut, hub.on_cut = lambda: 7, lambda: release.wait(TIMEOUT_S)
    try:
        assert "timed out; 6 tries" in str(refusal())
    finally:
        release.set()


def test_a_server_that_sends_too_slowly(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "SLOW_S", 0.0)
    assert "less than 1 KiB a second; 6 tries" in str(refusal())


def test_headers_without_end(hub: Hub) -> None:
    hub.refusals = [(200, {f"X-{number}": "x" * 60_000 for number in range(200)})] * 10
    assert "more than 100 headers" in str(refusal())
    hub.refusals = [(200, {"X": "x" * 100_000})] * 10
    assert "got more than 65536 bytes" in str(refusal())


def test_a_cache_that_cannot_be_written_serves_what_it_has(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bring()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it writes")

    for name in ("mkdir", "symlink_to", "replace", "write_bytes"):
        monkeypatch.setattr(Path, name, refuse)
    assert bring() == path


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "Connection refused" in str(refusal())


def test_offline_nothing_is_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in str(refusal()) and not hub.requests
    monkeypatch.delenv("HF_HUB_OFFLINE")
    path = bring()
    asked = len(hub.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert bring() == path and len(hub.requests) == asked


# --- what is wrong with the bytes ----------------------------------------------------------------------------------


def test_wrong_bytes_are_discarded(hub: Hub, home: Path) -> None:
    hub.spoil = lambda content: content[:-1] + bytes([content[-1] ^ 1])
    error = refusal()
    assert "wrong bytes" in str(error) and sha256(tiny_model.whole()) in str(error)
    assert everything(home) == {}
    hub.spoil = lambda content: content
    assert bring().is_file()


def test_bytes_that_were_damaged_on_the_disk_are_downloaded_again(hub: Hub, home: Path) -> None:
    content = hub.repos[REPO][FILE] = big(14 * MIB)
    hub.cut = lambda: 13 * MIB if len(hub.bodies()) == 1 else 1
    refusal()
    (part,) = in_hub(home).glob("blobs/*.part")
    with part.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"damage")
    hub.cut = lambda: None
    hub.requests.clear()
    assert bring().read_bytes() == content
    assert hub.starts() == [4 * MIB]


def test_a_page_in_place_of_a_model(hub: Hub, home: Path) -> None:
    hub.files["/files/x.gguf"] = b"<!DOCTYPE html><title>Sign in</title>"
    assert "is not a GGUF file: it begins with b'<!DO'" in str(refusal(f"{hub.url}/files/x.gguf"))
    assert everything(home) == {}


@pytest.mark.parametrize(
    ("spoil", "headers", "text"),
    [
        (lambda content: content + b"more", {}, "and the server has"),
        (lambda content: content[:-9], {}, "and the server has"),
        (None, {"Content-Range": "bytes 7-20/21"}, "another part of the file"),
        (None, {"Content-Range": "nonsense"}, "another part of the file"),
        (None, {"Content-Encoding": "gzip"}, "form that was not asked for"),
    ],
    ids=["longer", "shorter", "another part", "no range", "compressed"],
)
def test_lengths_and_ranges_that_are_not_true(hub: Hub, spoil: object, headers: dict[str, str], text: str) -> None:
    hub.spoil = spoil or hub.spoil  # type: ignore[assignment]
    hub.headers = headers
    assert text in str(refusal())


@pytest.mark.parametrize("length", ["70", "1000000000000", "-1", "many"])
def test_a_length_that_is_not_true(hub: Hub, home: Path, length: str) -> None:
    """What is too short is refused. All bytes with the right checksum are the file, whatever was said before."""
    hub.headers = {"Content-Length": length}
    if length == "70":
        assert "tries have failed" in str(refusal())
        assert all(".part" in name for name in everything(home)), everything(home)
        hub.headers = {}
    assert bring().read_bytes() == tiny_model.whole()


def test_a_file_that_changes_while_it_is_downloaded(hub: Hub) -> None:
    hub.files["/files/x.gguf"] = big(1000)
    hub.headers = {"ETag": '"1"'}
    made = pull.plan(ref_of(f"{hub.url}/files/x.gguf"), Watcher())
    hub.headers = {"ETag": '"2"'}
    with pytest.raises(StoreError, match="has changed"):
        pull.carry_out(made, ref_of(f"{hub.url}/files/x.gguf"), Watcher())


def test_an_answer_without_end(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "ANSWER_BYTES", 1000)
    hub.repos[REPO] |= {f"{number}.gguf": b"GGUF" for number in range(100)}
    assert "more than 1000 bytes as an answer" in str(refusal())


def test_names_that_would_lead_out_of_the_cache_are_not_used(hub: Hub, home: Path) -> None:
    hub.repos[REPO] = {
        "../../../../evil-Q4_K_M.gguf": b"GGUF1",
        "/etc/evil-Q4_K_M.gguf": b"GGUF2",
        "x-Q8_0.gguf": b"GGUF3",
    }
    assert bring().name == "x-Q8_0.gguf"
    hub.commit = "../../evil"
    assert "an answer that cannot be read" in str(refusal("hf:org/tiny-GGUF:Q3_K"))
    assert all(name.startswith(".cache/huggingface/hub/models--org--tiny-GGUF/") for name in everything(home))


# --- the disk ------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_not_begun(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": part_file.SPARE_BYTES}))
    assert "the disk is too small: " in str(refusal())
    assert not hub.bodies() and everything(home) == {}


def test_a_disk_that_becomes_full(hub: Hub, home: Path) -> None:
    """A limit of the size of files stands for it: the kernel refuses to write on, as on a full disk."""
    content = hub.repos[REPO][FILE] = big(9 * MIB)
    puller = Puller(home, HF_ENDPOINT=hub.url)
    try:
        said = puller.pull(NAME, 6 * MIB)
        assert said["error"].startswith("the disk is full: ") and "goes on from here" in said["hint"]
        assert caches.find(ref_of(NAME)) is None
        assert Path(puller.pull(NAME)["path"]).read_bytes() == content
    finally:
        puller.close()
    assert hub.starts() == [0, 4 * MIB]


# --- with huggingface_hub ------------------------------------------------------------------------------------------

OTHER = """
import json, sys
from huggingface_hub import hf_hub_download, scan_cache_dir, try_to_load_from_cache
repo, ours, theirs = sys.argv[1:]
found = try_to_load_from_cache(repo, ours)
again = hf_hub_download(repo, ours)
fetched = hf_hub_download(repo, theirs)
scan = scan_cache_dir()
print(json.dumps([found, again, fetched, [str(each) for each in scan.warnings], len(scan.repos)]))
"""


@pytest.mark.needs("huggingface_hub")
def test_huggingface_hub_finds_what_we_downloaded_and_we_find_what_it_did(hub: Hub, home: Path) -> None:
    theirs = "tiny-Q8_0.gguf"
    hub.repos[REPO][theirs] = tiny_model.whole() + b"other"
    path = bring()
    before = len(hub.bodies())
    env = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OTHER, REPO, FILE, theirs], capture_output=True, text=True, env=env, cwd=ROOT,
        timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, again, fetched, warnings, repos = json.loads(done.stdout)
    assert Path(found) == Path(again) == path
    assert (warnings, repos) == ([], 1)
    assert len(hub.bodies()) - before == 1, "it has downloaded its own file only"
    other = caches.find(ref_of(f"{NAME}:Q8_0"))
    assert other == Path(fetched) and bring(f"{NAME}:Q8_0") == other
    assert len(hub.bodies()) - before == 1, "and so have we"
