"""What a chat does with what it is told: a value with one door, `handle(event)`, which gives the orders that follow.

    Entered ──> Learn ──> Learned ──> Count ──> Counted ──> Ask ──> Answered ──> Keep
                (once for a model)    (while it is open what fits)

One question is on its way at a time. What a command needs from outside (the models that are there, a file) it orders,
and goes on when the fact arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import msgspec

from llambo.cli.chat import chat_events as e
from llambo.cli.chat.chat_commands import help_text, parse
from llambo.cli.chat.chat_fitting import Fitting
from llambo.cli.chat.chat_session import NAME_RULE, Session, Turn, is_name, matches, one_line, turn_count
from llambo.mesh.wire import limits

#: Turns that go along with a question, if there is room.
TURNS = 50
#: The longest answer when nobody has said another one.
CHAT_TOKENS = 1024
#: A question that leaves less than this for its answer is too long.
LEAST_ANSWER = 16
#: A line of the history has so much of the question, and of the answer.
SHOWN = 60
#: /history alone shows so many turns.
LISTED = 50


@dataclass(slots=True)
class _Pending:
    """The question that is on its way."""

    question: str
    at: int
    tries: int
    fitting: Fitting | None = None


class ChatCore:
    def __init__(self, session: Session, *, max_tokens: int = CHAT_TOKENS, turns: int = TURNS, keeps: bool = True):
        """`keeps`: the session has a file."""
        self.session = session
        #: What the model has room for; None: not asked yet, 0: no limit.
        self.context_tokens: int | None = None
        #: What the last question and its answer took of it.
        self.used_tokens = 0
        self._max_tokens = max_tokens
        self._turns = turns
        self._keeps = keeps
        self._pending: _Pending | None = None
        self._tries = 0
        #: So many earlier turns were left out last time, as the person was told.
        self._left_out = 0
        self._out: list[e.Order] = []

    def handle(self, event: e.Event) -> list[e.Order]:
        self._out = []
        match event:
            case e.Entered(text, at):
                self._on_entered(text, at)
            case e.Learned(context_tokens):
                self.context_tokens = context_tokens
                self._fit()
            case e.Counted(tokens):
                self._on_counted(tokens)
            case e.Answered():
                self._on_answered(event)
            case e.Failed(problem, hint):
                self._pending = None
                self._say(f"{problem}\n  {hint}" if hint else problem, "error")
            case e.Interrupted():
                self._pending = None
                self._say("stopped before there was an answer", "quiet")
            case e.ModelsFound(names, wanted):
                self._on_models(names, wanted)
            case e.Kept(session, path):
                self.session = session
                self._say(f"kept as {session.name}, in {path}")
            case e.Opened(session):
                self._on_opened(session)
            case _:
                assert_never(event)
        return self._out

    # --- what the person says --------------------------------------------------------------------------

    def _on_entered(self, text: str, at: int) -> None:
        # A terminal may give half characters, which no message could carry.
        text = text.encode(errors="replace").decode().strip("\n")
        if not text.strip():
            return
        if text.startswith("/") and not text.startswith("//"):
            self._command(*parse(text.rstrip()), at)
        else:
            self._begin(text[1:] if text.startswith("//") else text, at, tries=0)

    def _command(self, name: str, argument: str, at: int) -> None:
        match name:
            case "help":
                self._say(help_text())
            case "history":
                self._history(argument)
            case "clear":
                self._change(context_from=len(self.session.turns))
                self._left_out = self.used_tokens = 0
                self._say("the model begins anew; /history still has what was said", "quiet")
            case "status":
                self._out.append(e.ShowStatus(tuple(self._facts())))
            case "model":
                self._out.append(e.FindModels(argument))
            case "system":
                self._system(argument)
            case "save":
                self._save(argument)
            case "session":
                self._switch(argument)
            case "retry":
                self._retry(at)
            case "exit":
                self._out.append(e.Leave())
            case _:
                self._say(f"there is no command /{one_line(argument, SHOWN)}; /help lists them", "warning")

    def _history(self, argument: str) -> None:
        turns = self.session.turns
        if argument.startswith("#"):
            number = int(argument[1:]) if argument[1:].isdecimal() else 0
            if 1 <= number <= len(turns):
                self._out.append(e.ShowTurn(number, turns[number - 1]))
            else:
                self._say(f"there is no turn {argument}; there are {len(turns)}", "warning")
            return
        if argument:
            lines = [f"{number:>4}  {found}" for number, found in matches(turns, argument)]
            self._say("\n".join(lines) or f"nothing here has {argument!r} in it")
            return
        first = max(0, len(turns) - LISTED)
        lines = [f"      ({turn_count(first)} before these; /history TEXT finds them)"] if first else []
        for number, turn in enumerate(turns[first:], first + 1):
            if number == self.session.context_from + 1 > 1:
                lines.append("      -- begun anew --")
            mark = f" ({turn.mark})" if turn.mark else ""
            lines += [f"{number:>4}  you: {one_line(turn.question, SHOWN)}"]
            lines += [f"      model: {one_line(turn.answer, SHOWN)}{mark}"]
        self._say("\n".join(lines) or "nothing was said yet")

    def _facts(self) -> list[tuple[str, str]]:
        session, context = self.session, self.context_tokens
        named = session.name if self._keeps else "none: this chat is not kept"
        now = [turn for turn in session.current if turn.answer]
        used = f", the last answer ended at {self.used_tokens}" if self.used_tokens else ""
        size = {None: "not asked yet", 0: "no limit"}.get(context, f"{context} tokens{used}")
        left_out = f", {self._left_out} of them left out" if self._left_out else ""
        return [
            ("session", named),
            ("turns", f"{len(session.turns)}, {len(now)} since the model began{left_out}"),
            ("asks", session.model or "the only model there is"),
            ("context", size),
            ("answers", f"at most {self._answer_tokens()} tokens"),
            ("system", one_line(session.system, SHOWN) or "none"),
        ]

    def _system(self, argument: str) -> None:
        if not argument:
            self._say(self.session.system or "the model is not told how to behave; /system TEXT does")
        elif len(argument) > limits.SYSTEM_CHARS:
            self._say(f"at most {limits.SYSTEM_CHARS} characters", "warning")
        else:
            self._change(system="" if argument == "-" else argument)
            self._say("the model is not told how to behave" if argument == "-" else "from now on", "quiet")

    def _save(self, argument: str) -> None:
        if not self._keeps:
            self._say("this chat is not kept: it was begun with --private", "warning")
        elif argument and not is_name(argument):
            self._say(f"{argument!r} is no name: {NAME_RULE}", "warning")
        else:
            self._out.append(e.KeepAs(self.session, argument or self.session.name))

    def _switch(self, argument: str) -> None:
        if not argument:
            self._say(f"this is {self.session.name}; `llambo chat --list` shows the others")
        elif not self._keeps:
            self._say("nothing is kept of this chat, so it stays alone", "warning")
        elif not is_name(argument):
            self._say(f"{argument!r} is no name: {NAME_RULE}", "warning")
        elif argument != self.session.name:
            self._out.append(e.Open(argument))

    def _on_opened(self, session: Session) -> None:
        if session.model != self.session.model:
            self.context_tokens = None
        self.session = session
        self._left_out = self.used_tokens = self._tries = 0
        turns = len(session.turns)
        self._say(f"{session.name}: {turn_count(turns)} so far", "quiet")

    def _retry(self, at: int) -> None:
        if not self.session.current:
            self._say("nothing was asked yet", "warning")
        else:
            self._tries += 1
            self._begin(self.session.current[-1].question, at, self._tries)

    def _on_models(self, names: Sequence[str], wanted: str) -> None:
        asked = self.session.model or (names[0] if len(names) == 1 else "")
        if not wanted:
            lines = [f"{'*' if name == asked else ' '} {name}" for name in names]
            self._say("\n".join(lines) or "no model is served now", "plain" if lines else "warning")
        elif wanted not in names:
            self._say(f"no worker serves {wanted}; there is: {', '.join(names) or 'nothing'}", "warning")
        else:
            if wanted != asked:
                self.context_tokens, self.used_tokens = None, 0
            self._change(model=wanted)
            self._say(f"{wanted} is asked from now on", "quiet")

    # --- a question on its way -------------------------------------------------------------------------

    def _begin(self, question: str, at: int, tries: int) -> None:
        self._pending, self._tries = _Pending(question, at, tries), tries
        if self.context_tokens is None:
            self._out.append(e.Learn(self.session.model))
        else:
            self._fit()

    def _fit(self) -> None:
        pending = self._pending
        if pending is None:
            return
        told = self._earlier(pending)[-self._turns :] if self._turns else []
        room = self.context_tokens - self._answer_tokens() if self.context_tokens else 0
        pending.fitting = Fitting(self.session.system, told, pending.question, room)
        self._ask_or_count(pending, pending.fitting)

    def _on_counted(self, tokens: int) -> None:
        pending = self._pending
        if pending is not None and pending.fitting is not None:
            pending.fitting.told(tokens)
            self._ask_or_count(pending, pending.fitting)

    def _ask_or_count(self, pending: _Pending, fitting: Fitting) -> None:
        messages = fitting.question()
        if messages is not None:
            self._out.append(e.Count(self.session.model, messages))
            return
        answer = self._answer_tokens()
        if fitting.kept < 0:
            assert self.context_tokens, "without a limit everything fits"
            answer = self.context_tokens - fitting.tokens
            if answer < LEAST_ANSWER:
                self._pending = None
                text = f"this message has {fitting.tokens} tokens, and the context of the model {self.context_tokens}"
                self._out.append(e.Refuse(f"{text}; it was not sent"))
                return
            self._say(f"this message is long: {answer} tokens are left for the answer", "warning")
        kept = max(fitting.kept, 0)
        self._tell_left_out(self._earlier(pending), kept)
        messages = fitting.messages(kept)
        self._out.append(e.Ask(self.session.model, messages, answer, pending.tries))

    def _tell_left_out(self, earlier: list[Turn], kept: int) -> None:
        """Each time it changes: nobody should believe that the model knows what it does not see."""
        before, self._left_out = self._left_out, len(earlier) - kept
        if not self._left_out or self._left_out == before:
            return
        first = f"first {self._left_out} turns are" if self._left_out > 1 else "first turn is"
        begin = f"what it sees begins at {one_line(earlier[-kept].question, SHOWN)!r}" if kept else "it sees only this"
        by_number = kept == self._turns
        why = f"--turns {self._turns}" if by_number else f"its context has {self.context_tokens} tokens"
        self._say(f"the {first} left out of what the model sees ({why}); {begin}", "warning")

    def _on_answered(self, event: e.Answered) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        self.used_tokens = event.prompt_tokens + event.tokens if event.prompt_tokens else 0
        turn = Turn(pending.question, event.answer, event.ending, pending.at, event.model, event.tokens)
        turns = self.session.turns
        again = bool(pending.tries)
        if event.problem:
            self._say(f"{event.problem}\n  {event.hint}" if event.hint else event.problem, "error")
        if again and turns[-1].answer and not event.answer:
            self._say("the earlier answer stays", "quiet")
        else:
            self._change(turns=[*(turns[:-1] if again else turns), turn], used=pending.at)
        match event.ending:
            case "length":
                self._say(f"cut after {event.tokens} tokens; --max-tokens allows more", "quiet")
            case "stopped":
                self._say("stopped", "quiet")
            case "cancelled":
                self._say("somebody cancelled it", "warning")
            case "deadline":
                self._say("out of time", "warning")

    def _earlier(self, pending: _Pending) -> list[Turn]:
        """What the model may see. Asked again, a question does not see its own answer."""
        turns = self.session.current[:-1] if pending.tries else self.session.current
        return [turn for turn in turns if turn.answer]

    # --- small things ----------------------------------------------------------------------------------

    def _answer_tokens(self) -> int:
        """No more than half of what the model has room for: the question and what was said before need some, too."""
        return min(self._max_tokens, self.context_tokens // 2) if self.context_tokens else self._max_tokens

    def _change(self, **changes: object) -> None:
        self.session = msgspec.structs.replace(self.session, **changes)
        # What has no turn yet is no chat that anybody would look for.
        if self._keeps and self.session.turns:
            self._out.append(e.Keep(self.session))

    def _say(self, text: str, tone: e.Tone = "plain") -> None:
        self._out.append(e.Say(text, tone))
