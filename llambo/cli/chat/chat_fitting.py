"""Which turns go along with a question: as many of the latest as the model has room for.

Only the model can count its tokens, so this asks: `question()` says what to count next, `told(tokens)` is the answer.
A chat that fits is counted once; where something has to be left out, each further answer halves what it may be.
"""

from __future__ import annotations

from collections.abc import Sequence

from llambo.cli.chat.chat_events import Messages
from llambo.cli.chat.chat_session import Turn


class Fitting:
    def __init__(self, system: str, turns: Sequence[Turn], question: str, room: int) -> None:
        """`room`: tokens there are for all of it; 0: no limit."""
        self._system = (("system", system),) if system else ()
        self._turns = list(turns)
        self._question = (("user", question),)
        self._room = room
        #: So many turns surely fit (-1: not even the question alone, as far as is known), so many surely do not.
        self._fits, self._too_many = -1, len(self._turns) + 1
        #: Of what was found to fit, or else of the question alone.
        self.tokens = 0
        if not room or self._small():
            self._fits = len(self._turns)

    @property
    def kept(self) -> int:
        """How many of the latest turns go along; -1: not even the question has room."""
        return self._fits

    def question(self) -> Messages | None:
        """What is to be counted next. None: it is decided."""
        if self._too_many - self._fits <= 1:
            return None
        return self.messages(self._next())

    def told(self, tokens: int) -> None:
        number = self._next()
        if tokens <= self._room:
            self._fits, self.tokens = number, tokens
        else:
            self._too_many = number
            if number == 0:
                self.tokens = tokens

    def messages(self, turns: int) -> Messages:
        said = [
            part
            for turn in self._turns[len(self._turns) - turns :]
            for part in (("user", turn.question), ("assistant", turn.answer))
        ]
        return (*self._system, *said, *self._question)

    def _next(self) -> int:
        everything = len(self._turns)
        return everything if self._too_many > everything else (self._fits + self._too_many) // 2

    def _small(self) -> bool:
        """A token is a byte at least. Where half of the room would do for the bytes, a template has room as well."""
        return sum(len(content.encode()) for _, content in self.messages(len(self._turns))) * 2 <= self._room
