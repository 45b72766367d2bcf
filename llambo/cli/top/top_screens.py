"""What lies above the tables of `llambo top` for a while: a question, a story, the list of keys."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from llambo.cli.commands.why import summary, timeline
from llambo.mesh.wire.errors import LlamboError, printable

Asked = Callable[[], Awaitable[dict[str, Any]]]

#: How often an open story is told again.
AGAIN_S = 1.0

KEYS = """
1 2 3, Tab    workers, requests, events
arrows, PgUp  move; left and right show more columns

w, Enter      the story of the request: what became of it, why
c             cancel the request
d             drain the worker: it finishes what it runs
m             drain it, and move what it runs elsewhere at once
u             undrain: let it work again

s, r          sort by the next column; the other way round
/             show only the rows that have these words
Esc           show all rows again; close this
p             stand still, and go on
q             leave
"""


class Question(ModalScreen[str]):
    """Answers with the key of one of the choices, or with nothing."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,n,q", "answer('')", "no")]

    def __init__(self, text: str, choices: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._text = text
        self._choices = choices

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static(Text(self._text))
            told = [*self._choices, ("n", "no, leave it")]
            yield Static(Text("\n" + "\n".join(f"  {key}  {what}" for key, what in told)))

    def on_mount(self) -> None:
        for key, what in self._choices:
            self._bindings.bind(key, f"answer('{key}')", what)

    def action_answer(self, key: str) -> None:
        self.dismiss(key)


class Page(ModalScreen[None]):
    """A text that can be scrolled."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,w,enter,question_mark", "close", "close")]

    def __init__(self, title: str, text: str = "") -> None:
        super().__init__()
        self._title = title
        self._text = text

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="box page") as box:
            box.border_title = Text(self._title)
            box.border_subtitle = Text("Esc closes")
            yield Static(Text(self._text), id="text")

    def on_mount(self) -> None:
        self.query_one(".page").focus()

    def tell(self, text: str) -> None:
        self._text = text
        self.query_one("#text", Static).update(Text(text))

    @property
    def text(self) -> str:
        return self._text

    def action_close(self) -> None:
        self.dismiss(None)


class Story(Page):
    """What became of a request, told again as long as it is looked at."""

    def __init__(self, title: str, ask: Asked) -> None:
        super().__init__(title, "asking ...")
        self._ask = ask

    def on_mount(self) -> None:
        super().on_mount()
        self.set_interval(AGAIN_S, self._again)
        self._again()

    def _again(self) -> None:
        self.run_worker(self._look(), exclusive=True)

    async def _look(self) -> None:
        try:
            found = await self._ask()
        except LlamboError as error:
            self.tell(f"{printable(error.text)}\n{error.hint}")
            return
        self.tell(printable("\n".join([summary(found), "", *timeline(found["story"])])))
