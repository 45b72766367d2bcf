"""The versions of each class's settings, and which one it goes back to."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llambo.fleet.model import Fleet, Host, Node, NodeClass, NodeState, World
from llambo.fleet.versions import FILE, Versions, VersionsFile
from llambo.mesh.wire.errors import LlamboError


def fleet(ctx: int, **more: Any) -> Fleet:
    tiny = NodeClass(name="tiny", settings={"worker": {"ctx": ctx, **more}}, hosts=("here",), min=2, max=4)
    return Fleet(hosts={"here": Host(name="here")}, classes={"tiny": tiny})


def world(*marks: str, state: NodeState = NodeState.READY) -> World:
    return World(tuple(
        Node(name=f"tiny-{number:04}", node_class="tiny", host="here", fingerprint=mark, state=state)
        for number, mark in enumerate(marks, 1)
    ))  # fmt: skip


def mark(book: Versions, wanted: Fleet) -> str:
    return book.fingerprints(book.in_force(wanted))["tiny"]


def ctx(wanted: Fleet) -> object:
    return wanted.classes["tiny"].settings["worker"]["ctx"]


def test_it_goes_back_to_what_all_of_them_had_and_worked_with() -> None:
    book = Versions()
    book.note(fleet(1), world())
    one = mark(book, fleet(1))
    book.note(fleet(2), world(one, one))
    two = mark(book, fleet(2))
    # The update stops half-way, and so does the next one: neither is a version to go back to.
    book.note(fleet(3), world(two, one))
    three = mark(book, fleet(3))
    assert len({one, two, three}) == 3
    assert book.roll_back("tiny") and book.roll_back("tiny"), "a second time nothing changes"
    held = book.note(fleet(3), world(three, one))
    assert ctx(held) == 1 and mark(book, fleet(3)) == one

    # The number of workers is not part of it.
    more = replace(fleet(3).classes["tiny"], max=9)
    assert book.in_force(replace(fleet(3), classes={"tiny": more})).classes["tiny"].max == 9

    # Until the file changes.
    assert ctx(book.note(fleet(4), world(one, one))) == 4
    assert not book.of("tiny").refused and book.roll_back("tiny") and ctx(book.in_force(fleet(4))) == 1


@pytest.mark.parametrize("state", [NodeState.STARTING, NodeState.FAILED])
def test_what_never_worked_is_nothing_to_go_back_to(state: NodeState) -> None:
    book = Versions()
    book.note(fleet(1), world())
    book.note(fleet(2), world(mark(book, fleet(1)), state=state))
    assert not book.roll_back("tiny") and ctx(book.in_force(fleet(2))) == 2


def test_a_restart_is_another_fingerprint_and_no_other_version() -> None:
    book = Versions()
    book.note(fleet(1), world())
    first = mark(book, fleet(1))
    book.stop("tiny", first, "it was bad")
    assert book.stopped("tiny", first) == "it was bad" and not book.stopped("tiny", "another")
    book.restart("tiny", 3)
    second = mark(book, fleet(1))
    assert second != first and not book.stopped("tiny", first) and book.of("tiny").at_once == 3
    book.note(fleet(1), world(second))
    assert not book.roll_back("tiny")


def test_another_file_of_the_model_is_another_fingerprint(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"one")
    wanted, book = fleet(1, model=str(model)), Versions()
    first = mark(book, wanted)
    assert mark(book, wanted) == first
    model.unlink()
    assert mark(book, wanted) == first, "a missing file is not another version"
    model.write_bytes(b"other")
    second = mark(book, wanted)
    assert second != first
    model.write_bytes(b"a part of a third")
    assert book.fingerprint(wanted.classes["tiny"], wanted, still_s=3_600) == second, "the file is still being written"
    os.utime(model, ns=(1, 1))
    assert book.fingerprint(wanted.classes["tiny"], wanted, still_s=3_600) != second
    # The file under that path on another machine is not known here.
    far = replace(wanted, hosts={"here": Host(name="here", address="box")})
    assert mark(book, far) == mark(Versions(), far)


def test_another_release_is_another_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    before = mark(Versions(), fleet(1))
    monkeypatch.setattr("llambo.__version__", "99.0", raising=False)
    assert mark(Versions(), fleet(1)) != before


def test_it_is_written_whole_and_read_again(tmp_path: Path) -> None:
    versions = VersionsFile(tmp_path)
    with versions.changing() as book:
        book.note(fleet(1), world())
    assert versions.read() == book and book.of("tiny").now is not None
    (tmp_path / FILE).write_text("{", encoding="ascii")
    with pytest.raises(LlamboError, match=r"versions\.json cannot be read"):
        versions.read()
