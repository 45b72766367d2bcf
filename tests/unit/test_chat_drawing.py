"""Answers on a terminal: the output is written to an emulator, and its screen is read."""

from __future__ import annotations

import asyncio
import io
import os
import re

import pyte
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from llambo.cli.chat import screen as screen_module
from llambo.cli.chat.markdown import cut, finished, lines_of, make_parser
from llambo.cli.chat.screen import BLOCK_CHARS, DrawnAnswer, Painter
from llambo.cli.kit.answer_views import StdoutWriter
from llambo.mesh.client.answer_stream import Piece
from llambo.mesh.wire.errors import printable

#: Escape sequences that a drawn line may contain: colours and weights.
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
#: Pieces of markdown and of control sequences.
SCRAPS = [
    "word ", "two words ", "\n", "\n\n", "# ", "- ", "1. ", "> ", "    ", "**", "_", "`", "```", "~~~", "```python\n",
    "|", "|a|b|\n", "|---|---|\n", "[x](http://a.example)", "![p](q)", "<b>", "</b>", "<!--", "<kbd>", "</kbd>",
    "***\n", "===\n", "\\", "&amp;", "&#27;[31m", "&#x202e;", "\x1b[2J", "\x1b]0;owned\x07", "\x1b]8;;http://evil\x1b\\",
    "\r", "\r\n", "\x9b31m", "\u202e", "\0", "\t", "ü", "日本", "👩‍👩‍👧", "\u0301" * 5, "x" * 90,
]  # fmt: skip
MARKDOWN = st.lists(st.sampled_from(SCRAPS), max_size=40).map("".join)

TALK = """\
# A *title*

Some **bold** text,
and a second line with `code` &amp; <b>html</b>.

1. one
2. two

   still two

3. three

| name | size |
|------|-----:|
| a    |    1 |

```python
def f():

    return 1
```

> a quote
"""


def console(width: int = 60, *, no_color: bool = False) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, color_system="standard", width=width, no_color=no_color,
        legacy_windows=False,
    )  # fmt: skip


def blocks(text: str) -> list[tuple[str, str]]:
    return [(token.type, token.content) for token in make_parser().parse(text)]


def plain(lines: list[str]) -> list[str]:
    return [COLOURS.sub("", line) for line in lines]


class Terminal:
    """Where a DrawnAnswer draws."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, columns: int = 60, rows: int = 20) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self.stream = pyte.Stream(self.screen)
        self.writes: list[str] = []
        self.size = os.terminal_size((columns, rows))
        monkeypatch.setattr(screen_module, "terminal_size", lambda: self.size)

    def paint(self, drawn: str) -> None:
        if drawn:
            self.writes.append(drawn)
            self.stream.feed(drawn)

    def put(self, text: str) -> None:
        raise AssertionError("a terminal is painted")

    def lines(self) -> list[str]:
        """All that was ever on the screen, without the blank end of it."""
        above = ["".join(line[at].data for at in range(self.screen.columns)) for line in self.screen.history.top]
        lines = [line.rstrip() for line in [*above, *self.screen.display]]
        while lines and not lines[-1]:
            lines.pop()
        return lines


class WaitingLine:
    """A Waiting whose line the test sets."""

    def __init__(self) -> None:
        self.text = ""

    def line(self) -> str:
        return self.text

    def on_piece(self) -> None: ...

    def close(self) -> None: ...


def draw(
    terminal: Terminal, pieces: list[str], monkeypatch: pytest.MonkeyPatch, waiting: WaitingLine | None = None
) -> DrawnAnswer:
    """Each piece is drawn at once."""
    monkeypatch.setattr(screen_module, "FRAME_S", -1.0)
    monkeypatch.setattr(screen_module, "SHARE", 1.0)
    view = DrawnAnswer(terminal, console(terminal.size.columns), waiting or WaitingLine())  # type: ignore[arg-type]
    for piece in pieces:
        view.piece(Piece(piece, [1], 0))
        view.frame()
    return view


# --- markdown ------------------------------------------------------------------------------------------------


def test_markdown_becomes_lines() -> None:
    assert plain(lines_of(console(), TALK, 59)) == [
        "A title",
        "",
        "Some bold text,",
        "and a second line with code & <b>html</b>.",
        "",
        " 1 one",
        " 2 two",
        "   still two",
        " 3 three",
        "",
        "",
        " name  size",
        " ──────────",
        " a        1",
        "",
        "",
        "  def f():",
        "",
        "      return 1",
        "",
        "▌ a quote",
    ]


def test_without_colours_there_is_none_and_the_text_is_the_same() -> None:
    coloured, bare = lines_of(console(), TALK, 59), lines_of(console(no_color=True), TALK, 59)
    assert plain(bare) == plain(coloured)
    codes = {code for found in re.findall(r"\x1b\[([0-9;]*)m", "".join(bare)) for code in found.split(";")}
    assert codes <= {"0", "1", "2", "3", "4", "9", "49", "39"}, "weights, and the terminal's own colours"
    assert re.search(r"\x1b\[[0-9;]*3[1-7]", "".join(coloured)), "there were some to lose"


def test_where_a_link_leads_is_shown() -> None:
    (line,) = plain(lines_of(console(), "[the bank](http://evil.example/)", 59))
    assert line == "the bank (http://evil.example/)"


@pytest.mark.parametrize("width", [20, 59, 200])
@pytest.mark.parametrize(
    "text",
    [
        "w0w " * 30 + "w1w ![picture](q) w2w",
        "w0w ![picture](q) w1w ![](http://a.example/picture) w2w",
        "- w0w w1w\n  - " + "x" * 40 + " w2w ![picture](q)",
        "> w0w " + "x" * 90 + " w1w ![picture](q) w2w",
        "# w0w w1w ![*picture*](q) w2w",
        "|a|\n|---|\n|w0w w1w ![picture](q) w2w|\n",
        "[w0w w1w ![picture](q) w2w](http://a.example)",
    ],
)
def test_words_around_an_image_and_its_name_are_shown(text: str, width: int) -> None:
    shown = " ".join(plain(lines_of(console(width + 1), text, width)))
    assert all(word in shown for word in ("w0w", "w1w", "w2w", "picture") if word in text), shown


@settings(max_examples=200)
@given(MARKDOWN, st.integers(20, 100))
def test_whatever_a_model_says_nothing_of_it_is_an_order_to_the_terminal(text: str, width: int) -> None:
    for line in lines_of(console(), printable(text), width):
        assert "\n" not in line
        bare = COLOURS.sub("", line)
        assert bare == printable(bare)


@settings(max_examples=200)
@given(st.lists(st.sampled_from([scrap for scrap in SCRAPS if "&" not in scrap and "\\" not in scrap]), max_size=40))
def test_no_word_is_lost(scraps: list[str]) -> None:
    # Every word has a number. Not shown are the first line of a fence, and the definition of a link.
    text = printable("".join(f"w{number}w {scrap}" for number, scrap in enumerate(scraps)))
    shown = "".join(plain(lines_of(console(200), text, 200)))
    hidden = re.findall(r"(?:```|~~~)[^\n]*|\n *\[[^\n]*", text)
    for number in range(len(scraps)):
        word = f"w{number}w"
        assert word in shown.replace(" ", "") or any(word in line for line in hidden), (word, text)


@pytest.mark.parametrize(
    "text", [">" * 9_000 + " end", "- " * 4_000 + "end", "[" * 8_000 + "end", "*a_ " * 2_000 + "end",
             "|a" * 2_000 + "\n" + "|-" * 2_000 + "\n|end", "  " * 60 + "- end",
             "".join(f"{'  ' * depth}- at {depth}\n" for depth in range(60)) + "\nend"]
)  # fmt: skip
def test_what_is_nested_too_deeply_is_shown_as_it_was_written(text: str) -> None:
    assert "end" in "".join(plain(lines_of(console(), text, 59)))


# --- which blocks are done -----------------------------------------------------------------------------------


def test_a_block_is_done_when_the_next_one_has_begun() -> None:
    assert finished("One.") == finished("One.\n") == finished("One.\n\n") == 0
    assert finished("One.\n\nT") == 0, "half a line is not final"
    assert finished("One.\n\nTwo.\n") == len("One.\n\n")
    assert finished("1. one\n\n2") == finished("1. one\n\n2. two\n") == 0, "a list goes on"
    assert finished("```\na\n\n\nb\n") == 0
    assert finished("```\na\n```\nAfter.\n") == len("```\na\n```\n")


@settings(max_examples=100)
@given(MARKDOWN, MARKDOWN)
def test_what_is_done_stays_as_it_is_whatever_follows(text: str, more: str) -> None:
    text, more = printable(text), printable(more)
    at = finished(text)
    if at and not re.search(r"^ {0,3}\[[^\]]*\]:", text + more, re.MULTILINE):
        # (A link may be defined at the end, for the whole text. Then it stays as it was written.)
        alone = blocks(text[:at])
        assert blocks(text + more)[: len(alone)] == alone


def test_a_block_that_is_too_long_is_cut() -> None:
    assert cut("one two three") == ("one two ", "three")
    assert cut("a\nb\nc") == ("a\nb\n", "c")
    assert cut("x" * 10) == ("x" * 10, "")
    assert cut("```python\nx = 1\ny =") == ("```python\nx = 1\n", "```python\ny =")


# --- painting ------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(["a", "bb", ""]), max_size=3), st.lists(st.sampled_from("xyz"), max_size=14)
        ),
        max_size=12,
    )
)
def test_a_painted_tail_is_on_the_screen_as_drawn(steps: list[tuple[list[str], list[str]]]) -> None:
    screen = pyte.HistoryScreen(20, 10, history=1000)
    stream, painter, above = pyte.Stream(screen), Painter(len), list[str]()
    for done, tail in steps:
        stream.feed(painter.paint(done, tail, 20, 10))
        above += done
        whole = [*above, *tail]
        shown = [line.rstrip() for line in screen.display]
        assert shown[: screen.cursor.y] == whole[len(whole) - screen.cursor.y :]
        assert screen.cursor.x == 0
        assert not any(shown[screen.cursor.y :])


def test_what_has_left_the_screen_is_not_written_a_second_time() -> None:
    screen, painter = pyte.HistoryScreen(20, 10, history=1000), Painter(len)
    stream = pyte.Stream(screen)
    for count in range(1, 31):
        stream.feed(painter.paint([], [f"head {count}", *(f"line {number}" for number in range(count))], 20, 10))
    above = ["".join(line[at].data for at in range(20)).rstrip() for line in screen.history.top]
    shown = [line.rstrip() for line in screen.display if line.strip()]
    assert [*above, *shown] == ["head 9", *(f"line {number}" for number in range(30))]


def test_only_what_differs_is_written() -> None:
    painter = Painter(len)
    painter.paint([], ["one", "two", "thr"], 80, 24)
    grown = painter.paint([], ["one", "two", "three"], 80, 24)
    assert "one" not in grown and "two" not in grown and "three" in grown
    assert painter.paint([], ["one", "two", "three"], 80, 24) == ""
    assert "one" not in painter.paint(["one"], ["two", "three", "four"], 80, 24)


def test_a_terminal_that_became_narrower_is_painted_anew() -> None:
    screen, painter = pyte.Screen(40, 10), Painter(len)
    stream = pyte.Stream(screen)
    stream.feed("above\r\n")
    stream.feed(painter.paint([], ["x" * 30], 40, 10))
    # What a terminal makes of it that has 20 columns now: the line takes two rows.
    screen.reset()
    stream.feed("above\r\n" + "x" * 20 + "\r\n" + "x" * 10 + "\r\n")
    stream.feed(painter.paint([], ["x" * 19, "x" * 11], 20, 10))
    assert [line.rstrip() for line in screen.display[:4]] == ["above", "x" * 19, "x" * 11, ""]


# --- an answer, as it grows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize("rows", [40, 8])
def test_an_answer_that_came_in_pieces_stands_there_as_one_that_came_at_once(
    monkeypatch: pytest.MonkeyPatch, size: int, rows: int
) -> None:
    terminal = Terminal(monkeypatch, rows=rows)
    view = draw(terminal, [TALK[at : at + size] for at in range(0, len(TALK), size)], monkeypatch)
    view.close()

    def spoken(lines: list[str]) -> list[str]:
        return [line.strip() for line in lines if line.strip()]

    assert spoken(terminal.lines()) == spoken(plain(lines_of(console(), TALK, 59)))


def test_blocks_that_are_done_are_never_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    view = draw(terminal, ["First.\n\n", "Second.\n", "\n", *["more "] * 50], monkeypatch)
    view.close()
    assert sum("First" in write for write in terminal.writes) == 1
    assert sum("Second" in write for write in terminal.writes) == 1
    assert all(write.startswith("\x1b[?2026h") and write.endswith("\x1b[?2026l") for write in terminal.writes)


def test_the_waiting_line_goes_when_the_answer_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    waiting = WaitingLine()
    view = draw(terminal, [], monkeypatch, waiting)
    waiting.text = "waiting, 2 ahead"
    view.frame()
    assert terminal.lines() == ["waiting, 2 ahead"]
    view.piece(Piece("Hello", [1], 0))
    waiting.text = ""
    view.frame()
    assert terminal.lines() == ["Hello"]
    waiting.text = "nothing for 3 s"
    view.frame()
    assert terminal.lines() == ["Hello", "nothing for 3 s"]
    view.close()
    assert terminal.lines() == ["Hello"]


def test_a_block_without_an_end_is_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, rows=10)
    code = [f"line {number}\n" for number in range(BLOCK_CHARS // 8)]
    view = draw(
        terminal, ["```python\n", *["".join(code[at : at + 400]) for at in range(0, len(code), 400)]], monkeypatch
    )
    view.close()
    assert [line.strip() for line in terminal.lines() if line.strip()] == [line.strip() for line in code]
    assert max(map(len, terminal.writes)) < 20 * BLOCK_CHARS


@settings(max_examples=60)
@given(st.lists(st.sampled_from(SCRAPS), max_size=30))
def test_nothing_a_model_says_leaves_its_place(pieces: list[str]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        terminal = Terminal(monkeypatch, columns=40, rows=12)
        terminal.stream.feed("above\r\n")
        view = draw(terminal, pieces, monkeypatch)
        view.close()
        assert terminal.lines()[0].startswith("above")
        assert terminal.screen.title == ""
        for write in terminal.writes:
            left = re.sub(r"\x1b\[(\?(2026|25|7)[hl]|[0-9;]*m|[0-9]+A|J|K)", "", write)
            assert "\x1b" not in left and "\x07" not in left


def test_colours_are_for_the_terminal_and_text_is_for_a_pipe() -> None:
    async def scenario() -> bytes:
        read, write = os.pipe()
        out = StdoutWriter(write)
        out.put("plain \x1b[31m ")
        out.paint("\x1b[1mdrawn\x1b[0m")
        await out.flush()
        out.close()
        os.close(write)
        with os.fdopen(read, "rb") as file:
            return file.read()

    assert asyncio.run(scenario()) == b"plain \x1b[31m \x1b[1mdrawn\x1b[0m"


@pytest.fixture(autouse=True)
def any_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """CI runs without colours; here they are looked at."""
    monkeypatch.delenv("NO_COLOR", raising=False)
