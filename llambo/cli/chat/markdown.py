"""A model's markdown as lines for a terminal. A model's text may be hostile: no control character of it reaches the
terminal, and the target of a link is always shown beside its text.
"""

from __future__ import annotations

from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement
from rich.segment import Segment, Segments
from rich.style import Style
from rich.syntax import Syntax
from rich.text import Text

from llambo.mesh.wire.errors import printable

#: Lists in lists, quotes in quotes: the parser drops what is nested deeper.
NESTING = 40
#: Columns that a level of nesting, or a column of a table, takes at most, and what must be left for words.
LEVEL_COLUMNS, CELL_COLUMNS, WORD_COLUMNS = 4, 6, 12
#: Other languages are shown without colours: some of the hundreds of lexers are very slow on unsuitable text.
LEXERS = frozenset((
    "bash", "c", "console", "cpp", "css", "diff", "dockerfile", "go", "html", "ini", "java", "javascript", "js",
    "json", "jsx", "kotlin", "lua", "make", "makefile", "php", "powershell", "py", "python", "rb", "ruby", "rs",
    "rust", "sh", "shell", "sql", "swift", "toml", "ts", "tsx", "typescript", "xml", "yaml", "yml", "zig",
))  # fmt: skip


def make_parser() -> MarkdownIt:
    """HTML is text: as HTML it would be hidden, and with it a part of the answer."""
    return MarkdownIt("commonmark", {"html": False, "maxNesting": NESTING}).enable(["table", "strikethrough"])


_parser = make_parser()


def finished(text: str) -> int:
    """How many characters, from the start, belong to blocks that further text cannot change.

    That is everything before the last block, counting whole lines only: half a line may become anything.
    """
    whole = text[: text.rfind("\n") + 1]
    starts = [token.map[0] for token in _parser.parse(whole) if token.level == 0 and token.map and token.nesting >= 0]
    if len(starts) < 2:
        return 0
    return sum(len(line) + 1 for line in whole.split("\n")[: starts[-1]])


def cut(text: str) -> tuple[str, str]:
    """Split a block that is too long to be redrawn each time: its finished part, and the start of the rest."""
    at = max(text.rfind("\n"), text.rfind(" ")) + 1 or len(text)
    last = [token for token in _parser.parse(text) if token.level == 0][-1:]
    if last and last[0].type == "fence":
        at = text.rfind("\n") + 1 or len(text)
        opening = f"{last[0].markup}{last[0].info}\n"
        return text[:at], opening + text[at:]
    return text[:at], text[at:]


class _Heading(Heading):
    """Left-aligned, like all other text."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = self.text.copy()
        text.justify = "left"
        yield text


class _Code(CodeBlock):
    """Without a background, so that it is easy to copy and readable without colours."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lexer = self.lexer_name if self.lexer_name.lower() in LEXERS else "text"
        code = str(self.text).rstrip("\n")
        yield Syntax(code, lexer, theme="ansi_dark", word_wrap=True, padding=(0, 2), background_color="default")


class _Markdown(Markdown):
    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _Heading,
        "fence": _Code,
        "code_block": _Code,
    }

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        self.markup = text
        self.parsed = _adapted(_parser.parse(text))


def _adapted(tokens: list[Token]) -> list[Token]:
    """Line breaks and images as this terminal shows them.

    Each line break of the model is kept: models write verses, addresses, and lists without marks. An image becomes
    text. rich draws it as a block before its paragraph, on the same line; the paragraph, which is as wide as the
    screen, was then cut at the right edge and lost words.
    """
    for token in tokens:
        if token.type == "softbreak":
            token.type = "hardbreak"
        elif token.type == "image":
            name = token.content or str(token.attrs.get("src", "")).strip("/").rpartition("/")[2]
            token.type, token.tag, token.content, token.children = "text", "", f"🌆 {name}", None
        _adapted(token.children or [])
    return tokens


class _Harmless:
    """Filters after the markdown is parsed: only then is an entity such as `&#x202e;` the character it stands for."""

    def __init__(self, inner: Markdown | Text) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._inner, options):
            if not segment.control:
                yield Segment(printable(segment.text), _without_link(segment.style))


def _without_link(style: Style | None) -> Style | None:
    return style.update_link(None) if style is not None and style.link else style


def lines_of(console: Console, text: str, width: int) -> list[str]:
    """The text as lines of at most that width, with colours if the console has any, without blank lines around it."""
    options = console.options.update(width=width)
    markdown = _Markdown(text)
    shown = markdown if _fits(markdown.parsed, width) else Text(text)
    with console.capture() as captured:
        for line in console.render_lines(_Harmless(shown), options, pad=False):
            console.print(Segments([*_trimmed(line), Segment.line()]), soft_wrap=True, end="")
    lines = captured.get().split("\n")
    while lines and not lines[0]:
        lines.pop(0)
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _fits(tokens: list[Token], width: int) -> bool:
    """False: some words would be lost, so the text is shown as it was written."""
    deepest = max((token.level for token in tokens), default=0)
    cells = heads = 0
    for token in tokens:
        heads = 0 if token.type == "tr_open" else heads + (token.type == "th_open")
        cells = max(cells, heads)
    room = width - WORD_COLUMNS
    return deepest < NESTING - 1 and deepest * LEVEL_COLUMNS <= room and cells * CELL_COLUMNS <= width


def _trimmed(line: list[Segment]) -> list[Segment]:
    """Without blanks at its end, which would be copied along."""
    while line and not line[-1].text.strip() and not _visible(line[-1].style):
        line.pop()
    if line and not _visible(line[-1].style):
        line[-1] = Segment(line[-1].text.rstrip(" "), line[-1].style)
    return line


def _visible(style: Style | None) -> bool:
    if style is None:
        return False
    return bool(style.underline or style.reverse or (style.bgcolor and not style.bgcolor.is_default))
