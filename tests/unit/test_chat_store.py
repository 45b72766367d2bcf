"""Chats in files: whole, private, one at a time, and left alone where they cannot be read."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from llambo.cli import main
from llambo.cli.chat.store import FILE_BYTES, SavedChat, Store, Turn, is_name, matches
from llambo.cli.kit.common import state_folder
from llambo.cli.kit.failure import Exit
from llambo.mesh.wire.errors import Code, LlamboError

NOW = 1_700_000_000
CHAT = SavedChat(
    "travel", created=NOW, used=NOW, model="tiny", turns=[Turn("Where?", "There.\n\n*Far* away: ü€😀", at=NOW)]
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "llambo" / "chats")


@pytest.fixture
def at_home(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """The folder that the commands look into."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return store


def chat(*words: str) -> Result:
    return CliRunner().invoke(main.main, ["chat", *words], prog_name="llambo")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_saved_is_loaded(store: Store) -> None:
    path = store.save(CHAT)
    assert store.load("travel") == CHAT
    assert json.loads(path.read_text(encoding="utf-8"))["turns"][0]["answer"] == CHAT.turns[0].answer
    assert store.load("other") is None


def test_only_its_owner_can_read_it(store: Store) -> None:
    before = os.umask(0)
    try:
        path = store.save(CHAT)
        store.lock("travel")
    finally:
        os.umask(before)
    assert mode(path) == mode(store.folder / ".lock") == 0o600
    assert mode(store.folder) == 0o700
    store.close()


def test_a_folder_that_was_open_to_others_is_closed(store: Store) -> None:
    store.folder.mkdir(parents=True, mode=0o755)
    store.folder.chmod(0o755)
    store.save(CHAT)
    assert mode(store.folder) == 0o700


def test_a_save_that_fails_leaves_the_file_as_it_was_and_nothing_else(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.save(CHAT)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LlamboError, match="cannot be written: No space left"):
        store.save(msgspec.structs.replace(CHAT, turns=[]))
    assert path.read_bytes() == before
    assert [each.name for each in store.folder.iterdir()] == ["travel.json"]


def test_a_link_in_the_place_of_the_draft_is_not_followed(store: Store, tmp_path: Path) -> None:
    store.save(CHAT)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (store.folder / f".travel.{os.getpid()}.part").symlink_to(victim)
    with pytest.raises(LlamboError):
        store.save(CHAT)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", ".lock", "", "a/b", "a\0b"])
def test_a_name_is_never_a_way_out_of_the_folder(store: Store, name: str) -> None:
    for way in (store.load, store.delete, store.exists, lambda name: store.save(SavedChat(name))):
        with pytest.raises(LlamboError) as caught:
            way(name)
        assert caught.value.code is Code.BAD_REQUEST


WHOLE: dict[str, Any] = msgspec.to_builtins(CHAT)
DAMAGED: dict[str, bytes] = {
    "nothing": b"",
    "half": msgspec.json.encode(CHAT)[:40],
    "junk": b"\xff\xfe\x00junk",
    "no object": b"[]",
    "another kind": json.dumps(WHOLE | {"turns": {}}).encode(),
    "no question": json.dumps(WHOLE | {"turns": [{"answer": "x"}]}).encode(),
    "of a later release": json.dumps(WHOLE | {"format": 2}).encode(),
    "begins beyond its end": json.dumps(WHOLE | {"context_from": 2}).encode(),
    "deep": b"[" * 100_000,
    "an unknown ending": json.dumps(WHOLE | {"turns": [{"question": "x", "ending": "boom"}]}).encode(),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_reported_and_left_alone(at_home: Store, kind: str) -> None:
    at_home.save(CHAT)
    path = at_home.path("broken")
    path.write_bytes(DAMAGED[kind])
    with pytest.raises(LlamboError) as caught:
        at_home.open("broken", NOW)
    assert caught.value.code is Code.BAD_SETTING
    assert "left as it is" in caught.value.text
    listed = chat("--list")
    assert listed.exit_code == Exit.OK
    assert "travel" in listed.stdout and "broken" not in listed.stdout
    assert f"{path} cannot be read" in listed.stderr
    problems = {each["session"]: each["problem"] for each in json.loads(chat("--list", "--json").stdout)}
    assert problems["travel"] == "" and problems["broken"]
    assert path.read_bytes() == DAMAGED[kind]


def test_a_file_that_is_too_large_is_not_read(store: Store) -> None:
    store.save(CHAT)
    os.truncate(store.path("travel"), FILE_BYTES + 1)
    with pytest.raises(LlamboError, match="more than"):
        store.load("travel")


def test_what_a_later_release_added_is_no_damage(store: Store) -> None:
    store.save(CHAT)
    store.path("travel").write_bytes(json.dumps(WHOLE | {"colour": "blue"}).encode())
    assert store.load("travel") == CHAT


def test_a_session_is_open_once(store: Store) -> None:
    store.lock("travel")
    script = (
        "import sys; from pathlib import Path; from llambo.cli.chat.store import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "store.lock('other')\n"
        "store.lock('travel')\n"
    )  # fmt: skip
    command = [sys.executable, "-c", script, str(store.folder)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert "LlamboError: the session travel is open in another" in second.stderr
    store.unlock("travel")
    third = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert third.returncode == 0, third.stderr
    store.close()


def test_a_made_up_name_is_replaced_and_a_chosen_one_copied(store: Store) -> None:
    made_up = msgspec.structs.replace(CHAT, name="2026-11-21", unnamed=True)
    store.save(made_up)
    store.lock("2026-11-21")
    travel, _ = store.save_as(made_up, "travel")
    assert store.names() == ["travel"]
    assert not travel.unnamed
    again, _ = store.save_as(travel, "again")
    assert store.names() == ["again", "travel"]
    with pytest.raises(LlamboError, match="already"):
        store.save_as(again, "travel")
    store.close()


def test_the_state_folder_follows_the_environment() -> None:
    assert state_folder({"XDG_STATE_HOME": "/x"}) == Path("/x/llambo")
    assert state_folder({"HOME": "/home/me"}) == Path("/home/me/.local/state/llambo")


# --- names and searching ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "travel", "2026-11-21-2125", "a.b", "x" * 64])
def test_a_name(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-f", "a/b", "a b", "a\n", "é", "x" * 65, "a\0"])
def test_no_name(name: str) -> None:
    assert not is_name(name)


def test_a_search_shows_what_stands_around() -> None:
    found = list(matches([Turn("a" * 50 + " The Night Train " + "b" * 50, "night"), Turn("[x]", "")], "night"))
    assert [number for number, _ in found] == [1, 1]
    assert found[0][1].startswith("you: …aa")
    assert "The Night Train" in found[0][1]
    assert found[1][1] == "model: night"
    assert [number for number, _ in matches([Turn("[x]", "")], "[x")] == [1]


# --- the commands about them ---------------------------------------------------------------------------------


def test_kept_chats_are_listed_searched_and_removed(at_home: Store) -> None:
    at_home.save(CHAT)
    at_home.save(SavedChat("older", used=NOW - 10, turns=[Turn("What is AI?", "A far cry."), Turn("Why?", "So.")]))
    listed = chat("--list").stdout.splitlines()
    assert [line.split()[:2] for line in listed[1:]] == [["travel", "1"], ["older", "2"]]
    assert listed[2].endswith("What is AI?")
    (first, second) = json.loads(chat("--list", "--json").stdout)
    assert (first["session"], first["turns"], first["first"]) == ("travel", 1, "Where?")
    assert second["used"] == NOW - 10
    found = json.loads(chat("--search", "FAR", "--json").stdout)
    assert [(each["session"], each["turn"]) for each in found] == [("older", 1), ("travel", 1)]
    assert "far cry" in chat("--search", "far").stdout
    assert "no chat contains 'xyzzy'" in chat("--search", "xyzzy").stderr
    assert chat("--delete", "older").stdout == "older is removed\n"
    assert at_home.names() == ["travel"]
    assert chat("--delete", "older").exit_code == Exit.REFUSED


def test_an_empty_folder_is_no_error(at_home: Store) -> None:
    shown = chat("--list")
    assert (shown.exit_code, shown.stdout) == (Exit.OK, "")
    assert str(at_home.folder) in shown.stderr
