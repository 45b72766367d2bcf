"""What really happened in a run, written down while it runs and judged afterwards.

The checker knows nothing of how the mesh works. From the recorded dispatches and the fake engine's arithmetic
it can tell for every token whether it may follow its predecessor.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.naming import PLUS
from llambo.mesh.wire.tokens import Logprob
from llambo.worker.config import FakeOptions
from llambo.worker.engine.fake import POISON_INDEX
from llambo.worker.engine.fake_model import (
    START,
    adapted,
    answer_length,
    base_of,
    logprob_of,
    piece_of,
    plain_base,
    plain_next,
    result_of,
    wander_next,
)
from llambo.worker.engine.protocol import Start

#: Whatever has this in its prompt kills the engine that makes its sixth token.
POISON = b", with arsenic"
#: The name of an adapter, and the files that workers have under it; empty: none.
ADAPTER, ADAPTER_FILES = "a", ("v1", "v2", "")
#: Which broker, and which of its lives.
Life = tuple[int, int]
#: So many engines it may cost.
POISON_DEATHS = 2
#: A text's embedding is a quarter of a piece, so that many texts are many pieces, and some results more than a page.
EMBEDDING_SIZE = 1024


@dataclass
class Wanted:
    """A request as its client meant it."""

    message: m.InferenceRequest
    prompt: bytes
    answer_tokens: int
    cancelled: bool = False
    #: Its client went away, on purpose: it may end, or not be heard of again.
    abandoned: bool = False

    @property
    def poisonous(self) -> bool:
        return POISON in self.prompt


@dataclass
class Heard:
    """What one client heard of one request."""

    ids: list[int] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    logprobs: list[Logprob | None] = field(default_factory=list)
    placed: bool = False
    #: It was cancelled once more after its end, as by `llambo cancel`; and that was answered.
    late: bool = False
    answered: bool = False
    end: m.End | None = None
    error: ErrorInfo | None = None
    after_end: int = 0
    ends: int = 0


class History:
    def __init__(self, style: str, *, hangs: bool = False, apart: bool = False, limits: bool = False) -> None:
        self.style = style
        #: Clients have keys, and may be refused for what those allow.
        self.limits = limits
        #: Engines hang by themselves, which looks like a request's doing.
        self.hangs = hangs
        #: Requests may leave a broker and come back, and are suspected anew by each, and each time.
        self.apart = apart
        self.wanted: dict[bytes, Wanted] = {}
        self.heard: dict[tuple[str, bytes], Heard] = {}
        self.dispatches: dict[bytes, list[m.Dispatch]] = {}
        #: Under which name each request was submitted.
        self.owners: dict[bytes, str] = {}
        #: Those that a broker refused when their identity had more bytes there than it may.
        self.too_much: set[bytes] = set()
        self.tokens = 0
        #: ENDs that arrived at a client which holds more tokens than they count.
        self.outdated: list[str] = []
        #: Runs that were in an engine's batch when it died or hung by itself.
        self.died_running: set[bytes] = set()
        #: Of those, the ones that were the cause.
        self.killers: set[bytes] = set()
        #: Such deaths that were reported to a broker, by request: the broker's life, the run, its next token.
        self.deaths: dict[bytes, list[tuple[Life, bytes, int]]] = {}

    # --- writing -------------------------------------------------------------------------------------

    def dispatched(self, running: dict[bytes, Any], message: m.Dispatch) -> None:
        self.dispatches.setdefault(message.id, []).append(message)

    def check_owners(self, owners: Iterable[tuple[bytes, str]]) -> None:
        """Of all requests that a broker lists. None is there under a name that did not submit it."""
        for id, owner in owners:
            assert self.owners.get(id) == owner, f"{id.hex()[:8]} is listed for {owner!r}, who did not submit it"

    def delivered(
        self, client: str, id: bytes, ids: list[int], pieces: list[bytes], logprobs: Sequence[Logprob | None]
    ) -> None:
        heard = self._of(client, id)
        if heard.ends:
            heard.after_end += len(ids)
        heard.ids += ids
        heard.pieces += pieces
        heard.logprobs += logprobs
        self.tokens += len(ids)

    def end_arrived(self, client: str, end: m.End, held: int) -> None:
        """An END for a request that its client has introduced on this link, with the tokens that it holds."""
        if end.count < held and not self.wanted[end.id].cancelled:
            text = f"lost: an END with {end.count} tokens arrived, {held} are held"
            self.outdated.append(f"{text} [{client}, request {end.id.hex()[:8]}]")

    def placed(self, client: str, id: bytes) -> None:
        self._of(client, id).placed = True

    def ended(self, client: str, id: bytes, end: m.End, now_ms: int) -> None:
        heard = self._of(client, id)
        if heard.late and not heard.answered:
            heard.answered = True
            return
        heard.end = end
        heard.ends += 1

    def failed(self, client: str, id: bytes, error: ErrorInfo, now_ms: int) -> None:
        heard = self._of(client, id)
        if heard.late and not heard.answered:
            heard.answered = True
            return
        heard.error = error
        heard.ends += 1

    def engine_died(self, cause: bytes, batch: list[bytes]) -> None:
        self.died_running.update(batch)
        if cause:
            self.killers.add(cause)

    def death_reported(self, lost: m.EngineLost, life: Life, running: Container[bytes]) -> None:
        """Counts only runs that this broker has not given up before the report arrives."""
        for key, made in zip(lost.runs, lost.made, strict=True):
            if key in self.died_running and key in running and not lost.outside:
                self.deaths.setdefault(key[:16], []).append((life, key, made))

    def expect(self, client: str, id: bytes) -> None:
        self._of(client, id)

    def _of(self, client: str, id: bytes) -> Heard:
        return self.heard.setdefault((client, id), Heard())

    def waiting(self, gone: set[str]) -> bool:
        """True while a client that is alive still waits for an end."""
        return any(
            not heard.ends or heard.late > heard.answered
            for (client, _), heard in self.heard.items()
            if client not in gone
        )

    # --- judging -------------------------------------------------------------------------------------

    def judge(self, gone: set[str]) -> list[str]:
        """All that is wrong. `gone`: clients that vanished, to whom nothing is owed."""
        wrong = [*self.outdated]
        for (client, id), heard in self.heard.items():
            for problem in self._judge_one(client in gone, self.wanted[id], id, heard):
                wrong.append(f"{problem} [{client}, request {id.hex()[:8]}]")
        for id, deaths in self.deaths.items():
            lives = [life for life, key, _ in deaths if key in self.killers]
            most = max((lives.count(life) for life in lives), default=0)
            if most > POISON_DEATHS * (1 + self.apart):
                wrong.append(f"poison: it has killed {most} engines [request {id.hex()[:8]}]")
        return wrong

    def _judge_one(self, gone: bool, wanted: Wanted, id: bytes, heard: Heard) -> list[str]:
        wrong = []
        if wanted.message.task != "generate":
            return self._judge_task(gone, wanted, id, heard)
        if heard.after_end:
            wrong.append(f"duplicated: {heard.after_end} tokens after the END")
        if heard.ends > 1:
            wrong.append(f"duplicated: {heard.ends} ENDs")
        if (at := self._first_wrong(wanted, id, heard.ids)) is not None:
            wrong.append(f"wrong: token {at} does not follow from its predecessor")
        if heard.pieces != [piece_of(i) for i in heard.ids]:
            wrong.append("wrong: the text does not belong to the tokens")
        if heard.logprobs != self._logprobs(wanted, heard.ids):
            wrong.append("wrong: the logprobs do not belong to the tokens")
        if gone:
            return wrong
        if heard.late and not heard.answered:
            wrong.append("stuck: a cancel after the end was not answered")
        if heard.end is not None:
            return wrong + self._judge_end(id, wanted, heard, heard.end)
        return wrong + self._judge_failure(wanted, heard)

    @staticmethod
    def _logprobs(wanted: Wanted, ids: list[int]) -> list[Logprob | None]:
        count = wanted.message.logprobs
        return [] if count is None else [logprob_of(token, index, count) for index, token in enumerate(ids)]

    def _judge_task(self, gone: bool, wanted: Wanted, id: bytes, heard: Heard) -> list[str]:
        """Whole or nothing, once, and all of it from one dispatch."""
        wrong = [f"duplicated: {heard.ends} ENDs"] if heard.ends > 1 else []
        end = heard.end
        if heard.after_end:
            wrong.append(f"duplicated: {heard.after_end} pieces after the END")
        if end is not None and end.reason == "stop":
            if not wanted.cancelled or heard.pieces:
                made = [self._result(wanted, dispatch) for dispatch in self.dispatches.get(id, [])]
                if heard.pieces not in made:
                    wrong.append(f"wrong: {len(heard.pieces)} pieces are the result of no dispatch")
        elif heard.pieces and not gone:
            wrong.append(f"wrong: {len(heard.pieces)} pieces of a result that is not whole")
        if gone:
            return wrong
        if end is None:
            return [*wrong, *self._judge_failure(wanted, heard)]
        if end.reason == "cancelled":
            return wrong if wanted.cancelled else [*wrong, "failed: cancelled, though no client asked for it"]
        if end.reason == "deadline":
            return wrong if wanted.message.deadline_ms else [*wrong, "failed: deadline, though it has none"]
        if end.error is not None and end.error.code is Code.ENGINE_FAILED:
            return wrong + self._judge_poison(id, wanted)
        return wrong if end.error is None else [*wrong, f"failed: {end.error.code}: {end.error.text}"]

    def _judge_failure(self, wanted: Wanted, heard: Heard) -> list[str]:
        if not heard.ends:
            return ["stuck: it never ended"]
        if heard.error is not None and not self._may_fail(wanted, heard, heard.error):
            if heard.error.code is Code.ENGINE_FAILED:  # it came back when its tokens were gone, but not why it ended
                return self._judge_poison(wanted.message.id, wanted)
            return [f"failed: {heard.error.code}: {heard.error.text}"]
        return []

    def _result(self, wanted: Wanted, dispatch: m.Dispatch) -> list[bytes]:
        start = Start(
            dispatch.id + dispatch.dispatch, wanted.prompt, wanted.message.max_tokens, 0, task=wanted.message.task
        )
        return result_of(
            start,
            FakeOptions(style="plain" if self.style == "plain" else "wander", embedding_size=EMBEDDING_SIZE),
            "fake",
        )

    def _judge_poison(self, id: bytes, wanted: Wanted) -> list[str]:
        """Two engines died running it, and it made no progress in between. Two killers may harm a third request."""
        reported = self.deaths.get(id, [])
        # (the first of them perhaps to a broker that is gone: an orphan's message says that it is a suspect)
        if len(reported) < 2:
            return [f"poison: ended after {len(reported)} deaths of engines that ran it"]
        reached = [made for _, _, made in reported]
        if not any(later <= made for at, made in enumerate(reached) for later in reached[at + 1 :]):
            return [f"poison: ended although it came further each time: {reached}"]
        others = {key[:16] for key in self.killers} - {id}
        if not wanted.poisonous and len(others) < 2 and not self.hangs:
            return ["poison: a harmless request was ended"]
        return []

    def _judge_end(self, id: bytes, wanted: Wanted, heard: Heard, end: m.End) -> list[str]:
        if not wanted.cancelled and len(heard.ids) != end.count:
            return [f"lost: {len(heard.ids)} of {end.count} tokens were delivered"]
        if end.reason == "cancelled":
            return [] if wanted.cancelled else ["failed: cancelled, though no client asked for it"]
        if end.reason == "deadline":
            return [] if wanted.message.deadline_ms else ["failed: deadline, though it has none"]
        if end.error is not None and end.error.code is Code.ENGINE_FAILED:
            return self._judge_poison(id, wanted)
        if end.error is not None:
            return [f"failed: {end.error.code}: {end.error.text}"]
        length, reason = self._length(wanted)
        if wanted.poisonous and length > POISON_INDEX:
            return ["poison: it was answered"]
        if (end.count, end.reason) != (length, reason):
            return [f"lost: ended after {end.count} tokens by {end.reason}, should be {length} by {reason}"]
        return []

    def _length(self, wanted: Wanted) -> tuple[int, str]:
        limit, mean = wanted.message.max_tokens, wanted.answer_tokens
        seed = wanted.message.seed
        assert seed is not None
        natural = answer_length(seed, wanted.prompt, mean) if mean else limit + 1
        return (natural, "stop") if natural <= limit else (limit, "length")

    def _may_fail(self, wanted: Wanted, heard: Heard, error: ErrorInfo) -> bool:
        if error.code in (Code.UNKNOWN_REQUEST, Code.EXPIRED):
            # An attach or a cancel that came after the end had been acknowledged.
            return wanted.cancelled or wanted.abandoned
        if error.code is Code.DEADLINE:
            # An attach that came after it: what there is, is why it ended.
            return bool(wanted.message.deadline_ms)
        if error.code is Code.OVER_LIMIT:
            # Limits are for what is new. What a broker has accepted the next does not refuse: the client can prove it.
            # (But for bytes, where several have admitted what they may, or a limit became a lower one.)
            return self.limits and (not heard.placed or wanted.message.id in self.too_much)
        return error.code is Code.BUSY

    def _first_wrong(self, wanted: Wanted, id: bytes, ids: list[int]) -> int | None:
        """The index of the first token that no recorded dispatch can have said there.

        Of a request for an adapter all tokens are of one file, wherever it ran.
        """
        prompts = [wanted.prompt]
        if PLUS in wanted.message.model:
            prompts = [adapted(wanted.prompt, path) for path in ADAPTER_FILES if path]
        wrong = [self._first_wrong_of(wanted, id, ids, prompt) for prompt in prompts]
        return None if None in wrong else max(at for at in wrong if at is not None)

    def _first_wrong_of(self, wanted: Wanted, id: bytes, ids: list[int], prompt: bytes) -> int | None:
        if self.style == "plain":
            base = plain_base(wanted.message.seed or 0, prompt)
            return next((i for i, token in enumerate(ids) if token != plain_next(base, i)), None)
        made = self.dispatches.get(id, [])
        bases = [base_of(dispatch.dispatch, prompt) for dispatch in made]
        current, previous = 0, START
        for index, token in enumerate(ids):
            before = current
            while current < len(bases) and wander_next(bases[current], previous) != token:
                current += 1  # from here on a later dispatch speaks (and others, of another broker perhaps, never did)
            if current == len(bases):
                return index
            if current != before and made[current].prefix[:index] != ids[:index]:
                return index
            previous = token
        return None
