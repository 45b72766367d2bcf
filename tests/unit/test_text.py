"""The text gate: which text may be delivered, and when."""

from __future__ import annotations

import random

import pytest

from llambo.worker.llama.text_gate import TextGate, incomplete_bytes


def run(stops: list[str], pieces: list[bytes]) -> tuple[list[int], bytes, bool]:
    """The output of a gate, and whether it stopped."""
    gate, ids, text = TextGate(stops), list[int](), b""
    for token, piece in enumerate(pieces):
        out_ids, out_pieces, stopped = gate.push(token, piece)
        assert len(out_ids) == len(out_pieces)
        ids += out_ids
        text += b"".join(out_pieces)
        text.decode()
        if stopped:
            return ids, text, True
    out_ids, out_pieces = gate.flush()
    return ids + out_ids, text + b"".join(out_pieces), False


@pytest.mark.parametrize(
    ("text", "count"),
    [(b"", 0), (b"a", 0), ("é".encode(), 0), ("é".encode()[:1], 1), ("€".encode()[:2], 2), ("😀".encode()[:3], 3),
     ("😀".encode(), 0), (b"\x80\x80\x80\x80", 0), (b"\xff", 0), (b"a\xc3", 1)],
)  # fmt: skip
def test_half_characters_are_seen(text: bytes, count: int) -> None:
    assert incomplete_bytes(text) == count


def test_a_character_comes_with_the_token_that_completes_it() -> None:
    gate = TextGate()
    first, second, third = "€".encode()[:1], "€".encode()[1:2], "€".encode()[2:]
    assert gate.push(1, b"a" + first) == ([1], [b"a"], False)
    assert gate.push(2, second) == ([2], [b""], False)
    assert gate.push(3, third + b"b") == ([3], ["€b".encode()], False)


def test_bytes_that_are_no_text_are_not_held_for_ever() -> None:
    gate = TextGate()
    assert gate.push(1, b"\xe2")[1] == [b""]
    assert gate.push(2, b"xx")[1] == [b"\xe2xx"]


def test_a_stop_string_is_never_half_shown() -> None:
    gate = TextGate(["###"])
    assert gate.push(1, b"a#") == ([], [], False)
    assert gate.push(2, b"#") == ([], [], False)
    # It was no stop string: everything that waited is delivered
    assert gate.push(3, b"b") == ([1, 2, 3], [b"a#", b"#", b"b"], False)
    assert gate.push(4, b"c##") == ([], [], False)
    # It is one: the text before it is delivered with its token
    assert gate.push(5, b"#d") == ([4], [b"c"], True)
    assert gate.stop_string == "###"


@pytest.mark.parametrize(
    ("stops", "text", "found"),
    [(["b", "a"], b"xab", "a"), (["ab", "a"], b"xab", "ab"), (["a", "ab"], b"xab", "a"), (["y"], b"xab", "")],
)
def test_the_stop_string_that_comes_first_is_the_one_that_ended_it(stops: list[str], text: bytes, found: str) -> None:
    gate = TextGate(stops)
    gate.push(1, text)
    assert gate.stop_string == found


def test_the_earliest_of_several_stop_strings_counts() -> None:
    assert run(["world", "lo"], [b"hel", b"lo wor", b"ld"]) == ([0], b"hel", True)


def test_a_stop_string_that_begins_a_token_takes_the_whole_token() -> None:
    assert run(["\n"], [b"one", b"\ntwo"]) == ([0], b"one", True)


def test_what_waits_at_the_end_belongs_to_the_answer() -> None:
    assert run(["###"], [b"a", b"#"]) == ([0, 1], b"a#", False)


@pytest.mark.parametrize("seed", range(50))
def test_a_continued_answer_is_the_undisturbed_one(seed: int) -> None:
    """Cut anywhere that was delivered, go on in a new gate: same ids, same bytes."""
    chance = random.Random(seed)
    whole = "".join(chance.choices("ab#é€😀", k=60)).encode()
    cuts = sorted(chance.sample(range(1, len(whole)), 25))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    stops = ["##a", "€€", "b#é"]
    ids, text, stopped = run(stops, pieces)
    for cut in range(len(ids)):
        sent = b""
        gate = TextGate(stops)
        count = 0
        for token, piece in enumerate(pieces):
            out_ids, out_pieces, _ = gate.push(token, piece)
            take = min(len(out_ids), cut - count)
            sent += b"".join(out_pieces[:take])
            count += take
            if count == cut:
                break
        gate = TextGate(stops)
        gate.replay(enumerate(pieces[:cut]))
        again_ids, again = list(range(cut)), sent
        again_stopped = False
        for token in range(cut, len(pieces)):
            out_ids, out_pieces, again_stopped = gate.push(token, pieces[token])
            again_ids += out_ids
            again += b"".join(out_pieces)
            if again_stopped:
                break
        if not again_stopped:
            out_ids, out_pieces = gate.flush()
            again_ids += out_ids
            again += b"".join(out_pieces)
        assert (again_ids, again, again_stopped) == (ids, text, stopped)
