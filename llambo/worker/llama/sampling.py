"""From logits to the next token: the options of a request, applied in the order in which llama.cpp applies them.

    bias, penalties -> DRY -> top-k -> typical -> top-p -> min-p -> XTC -> temperature -> choice

What walks or sorts the whole vocabulary is done natively (`Narrowing`). What is short or random is done here. Nothing
is remembered between tokens but the tokens themselves, so an answer that has moved goes on as if it had not: its tokens
are accepted again. The exception is mirostat: its target depends on the surprise of each token, which is not known
again, so it starts over.

Randomness is a function: the same seed, index and token give the same number on any worker. Nothing is drawn from a
generator, because an answer that moves brings no random state along, only its seed and its tokens. Each candidate gets
a number from a hash of (seed, index, token), shaped so that the token with the largest sum of logit and number is
chosen as often as its probability says (the Gumbel trick). A token keeps its number whatever the others do, so two
workers whose logits differ in the last digit choose alike unless two candidates are nearly equal. With one draw for all
candidates every shift of their order would matter.

A grammar is asked last: most chosen tokens pass, and only one that does not makes the whole vocabulary be masked.

Log probabilities are of the logits as the model gave them. They are not the distribution the token was drawn from:
callers know the biases, penalties, grammar and temperature they asked for, but not what the model computed.

Options of the request come first, then those in the model's file, then our defaults. A model file may contain the
options that its authors recommend. llama.cpp's tools use them as defaults, so a request without options means the same
here as there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from llambo.mesh.wire import limits
from llambo.mesh.wire.messages import Sampling
from llambo.mesh.wire.tokens import LOWEST_LOGPROB, Logprob, TopToken
from llambo.worker.engine.protocol import GOLDEN, MASK_64, mix

#: Purposes of a random number: two uses at one index are independent.
TOKEN, XTC = 1, 2
Ids = NDArray[np.int32]
Logits = NDArray[np.float32]
#: Names in the file and in a request. (The order of samplers, `sequence`, is not read: it is fixed here.)
KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.xtc_probability": "xtc_probability",
    "general.sampling.xtc_threshold": "xtc_threshold",
    "general.sampling.penalty_last_n": "penalty_last_n",
    "general.sampling.penalty_repeat": "repeat_penalty",
    "general.sampling.mirostat": "mirostat",
    "general.sampling.mirostat_tau": "mirostat_tau",
    "general.sampling.mirostat_eta": "mirostat_eta",
}
Defaults = dict[str, int | float]
_SHOWN = frozenset({"temperature", "top_k", "top_p", "min_p"})


def base(seed: int, index: int, purpose: int) -> int:
    return mix((mix((seed + GOLDEN) & MASK_64) + index * GOLDEN + purpose) & MASK_64)


def uniform(seed: int, index: int, purpose: int) -> float:
    """In [0, 1)."""
    return (base(seed, index, purpose) >> 11) / 2**53


def gumbel(seed: int, index: int, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
    """One number for each token: `mix` as above, for a whole array."""
    value = tokens.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(base(seed, index, TOKEN))
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    share = ((value >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53
    numbers: NDArray[np.float64] = -np.log(-np.log(share))
    return numbers


class Grammar(Protocol):
    """Which tokens may come next."""

    def allows(self, token: int) -> bool: ...
    def accept(self, token: int) -> None: ...
    def apply(self, candidates: Any) -> None:
        """Set the logit of each token that may not come to minus infinity, in a native array of candidates."""


class Narrowing(Protocol):
    """The native part: the candidates that are left of these logits, and their logits after DRY."""

    def narrow(self, logits: Logits, grammar: Grammar | None) -> tuple[Ids, Logits]: ...
    def mask(self, logits: Logits, grammar: Grammar) -> tuple[Ids, Logits]: ...
    def accept(self, token: int) -> None: ...


class DeadEnd(Exception):
    """No token is allowed."""


class Sampler:
    """The sampler of one request. `history` is its prompt and its tokens so far; all of it counts for penalties."""

    def __init__(
        self,
        options: Sampling,
        seed: int,
        narrowing: Narrowing,
        *,
        history: list[int],
        grammar: Grammar | None = None,
        banned: list[int] | None = None,
    ) -> None:
        self._options = options
        self._seed = seed
        self._narrowing = narrowing
        self._grammar = grammar
        self._history = history
        self._bias = _bias(options, banned or [])
        self._penalised = options.penalty_last_n != 0 and (
            options.repeat_penalty != 1 or bool(options.presence_penalty or options.frequency_penalty)
        )
        #: Always the likeliest token: nothing has to be sorted.
        self._greedy = options.temperature == 0 and not options.mirostat and not options.dry_multiplier
        self._mu = 2 * options.mirostat_tau

    def choose(self, logits: Logits, index: int) -> int:
        """The token at this index of the answer. Raises DeadEnd."""
        logits = self._adjusted(logits)
        if self._greedy:
            token = int(logits.argmax())
        else:
            token = self._draw(*self._narrowing.narrow(logits, None), index)
        if self._grammar is not None and not self._grammar.allows(token):
            token = self._choose_allowed(logits, index, self._grammar)
        self.accept(token)
        return token

    def accept(self, token: int) -> None:
        self._history.append(token)
        self._narrowing.accept(token)
        if self._grammar is not None:
            self._grammar.accept(token)

    def _choose_allowed(self, logits: Logits, index: int, grammar: Grammar) -> int:
        if self._greedy:
            ids, left = self._narrowing.mask(logits, grammar)
            best = int(left.argmax())
            if not np.isfinite(left[best]):
                raise DeadEnd
            return int(ids[best])
        ids, left = self._narrowing.narrow(logits, grammar)
        allowed = np.isfinite(left)
        if not allowed.any():
            raise DeadEnd
        return self._draw(ids[allowed], left[allowed], index)

    def _adjusted(self, logits: Logits) -> Logits:
        """A copy if anything has to change, because the row belongs to the engine."""
        if self._bias is None and not self._penalised:
            return logits
        logits = logits.copy()
        if self._bias is not None:
            ids, bias = self._bias
            logits[ids] += bias
        if self._penalised:
            self._penalise(logits)
        return logits

    def _penalise(self, logits: Logits) -> None:
        options, last = self._options, self._options.penalty_last_n
        window = self._history if last < 0 else self._history[-last:]
        if not window:
            return
        ids, counts = np.unique(np.array(window, np.int32), return_counts=True)
        values = logits[ids]
        repeat = np.float32(options.repeat_penalty)
        values = np.where(values > 0, values / repeat, values * repeat)
        values -= counts.astype(np.float32) * np.float32(options.frequency_penalty)
        logits[ids] = values - np.float32(options.presence_penalty)

    def _draw(self, ids: Ids, logits: Logits, index: int) -> int:
        options = self._options
        if options.temperature == 0 and not options.mirostat:
            return int(ids[logits.argmax()])
        if options.xtc_probability and uniform(self._seed, index, XTC) < options.xtc_probability:
            ids, logits = _exclude_top(ids, logits, options.xtc_threshold)
        heated = logits / np.float32(max(options.temperature, 1e-3))
        if options.mirostat:
            return self._mirostat(ids, heated, index)
        return int(ids[(heated + gumbel(self._seed, index, ids)).argmax()])

    def _mirostat(self, ids: Ids, logits: Logits, index: int) -> int:
        """Version 2: drop tokens with a surprise above mu, then adapt mu to the surprise of the chosen one."""
        surprise = -np.log2(np.maximum(softmax(logits), 1e-30))
        near = surprise <= self._mu
        if not near.any():
            near = surprise == surprise.min()
        ids, logits = ids[near], logits[near]
        chosen = int((logits + gumbel(self._seed, index, ids)).argmax())
        observed = -float(np.log2(max(softmax(logits)[chosen], 1e-30)))
        self._mu -= self._options.mirostat_eta * (observed - self._options.mirostat_tau)
        return int(ids[chosen])


def _bias(options: Sampling, banned: list[int]) -> tuple[Ids, Logits] | None:
    bias = dict(options.logit_bias)
    bias.update(dict.fromkeys(banned, -np.inf))
    if not bias:
        return None
    return np.array(list(bias), np.int32), np.array(list(bias.values()), np.float32)


def _exclude_top(ids: Ids, logits: Logits, threshold: float) -> tuple[Ids, Logits]:
    """XTC: of all tokens likelier than the threshold only the least likely stays, and those below it."""
    shares = softmax(logits)
    top = shares >= threshold
    if top.sum() < 2:
        return ids, logits
    top[np.where(top, shares, np.inf).argmin()] = False
    return ids[~top], logits[~top]


def softmax(logits: Logits) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = np.exp(logits.astype(np.float64) - float(logits.max()))
    shares /= shares.sum()
    return shares


def logprob_of(logits: Logits, token: int, count: int, piece_of: Callable[[int], bytes]) -> Logprob:
    """For the chosen token and the `count` likeliest. Of equal ones the lower id comes first."""
    highest = float(logits.max())
    # Summed in double precision: over a large vocabulary single precision loses the fourth digit.
    total = highest + float(np.log(np.exp(logits - np.float32(highest)).sum(dtype=np.float64)))

    def bounded(logit: float) -> float:
        return min(0.0, max(LOWEST_LOGPROB, logit - total))

    count = min(count, len(logits))
    top: list[TopToken] = []
    if count:
        lowest = np.partition(logits, len(logits) - count)[len(logits) - count]
        # Include all that are as likely as the last one: which of those partition selects is not defined.
        likeliest = np.flatnonzero(logits >= lowest)
        order = likeliest[np.argsort(-logits[likeliest], kind="stable")][:count]
        top = [
            TopToken(int(id), piece_of(int(id))[: limits.LOGPROB_PIECE_BYTES], bounded(float(logits[id])))
            for id in order
        ]
    return Logprob(bounded(float(logits[token])), top)


def recommended(metadata: Mapping[str, Any]) -> tuple[Defaults, list[str]]:
    """What the model file recommends, and a text about each value that cannot be used."""
    found: Defaults = {}
    unusable: list[str] = []
    for key, name in KEYS.items():
        if key not in metadata:
            continue
        value = _number(metadata[key])
        try:
            msgspec.convert({name: value}, Sampling)
        except msgspec.ValidationError as error:
            unusable.append(f"{key} is {metadata[key]!r}: {error}")
        else:
            found[name] = value
    return found, unusable


def _number(value: Any) -> Any:
    """Some files have integers as floats. A float of four bytes is rounded to what was meant: 0.95, not 0.94999998."""
    if not isinstance(value, float):
        return value
    return int(value) if value.is_integer() else float(f"{value:.6g}")


def with_defaults(options: Sampling, given: Collection[str], defaults: Defaults) -> Sampling:
    """`given`: the names of the options that the request sets."""
    missing = {name: value for name, value in defaults.items() if name not in given}
    return msgspec.structs.replace(options, **missing) if missing else options


def numeric_options(defaults: Defaults) -> dict[str, Any]:
    """All numeric options of a request that sets none."""
    options: dict[str, Any] = msgspec.to_builtins(with_defaults(Sampling(), (), defaults))
    every = {name: getattr(Sampling(), name) for name in Sampling.__struct_fields__} | options
    return {name: value for name, value in every.items() if isinstance(value, int | float)}


def describe(defaults: Defaults) -> str:
    """For the log of a worker that starts."""
    options = with_defaults(Sampling(), (), defaults)
    shown = ", ".join(
        f"{name.replace('_', '-')} {getattr(options, name):g}{' (from the model)' if name in defaults else ''}"
        for name in ("temperature", "top_k", "top_p", "min_p", *(name for name in defaults if name not in _SHOWN))
    )
    return f"sampling defaults: {shown}"
