"""`/v1/completions`: OpenAI's older API, which continues a text as it is, without a chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any

from msgspec import Meta

from llambo.gateway.answers.asking import About, Ask, Event, Prepared, Token, encode
from llambo.gateway.answers.problems import FieldError, body
from llambo.gateway.apis import openai_common as common
from llambo.mesh.client.answer_stream import Answer
from llambo.mesh.wire.errors import LlamboError

#: Prompts of one request.
PROMPTS = 128
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
#: A text, some texts, the tokens of a text, or those of some.
Prompt = str | list[str] | list[TokenId] | list[list[TokenId]]


class CompletionRequest(common.Asked, kw_only=True):
    prompt: str | list[Any]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


def inputs_of(asked: CompletionRequest) -> list[str] | list[list[int]]:
    """The prompts: texts, or tokens that have to become texts first."""
    given = asked.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        raise FieldError("prompt", "prompt: is empty")
    if all(isinstance(each, str) for each in given):
        found: list[Any] = given
    elif all(map(_is_id, given)):
        found = [given]
    elif all(isinstance(each, list) and each and all(map(_is_id, each)) for each in given):
        found = given
    else:
        raise FieldError("prompt", "prompt: expected a text, a list of texts, of token ids, or of lists of token ids")
    if len(found) > PROMPTS:
        raise FieldError("prompt", f"prompt: {len(found)} prompts, {PROMPTS} may be")
    return found


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def prepare(asked: CompletionRequest, prompts: list[str], answer_tokens: int) -> Prepared:
    if asked.suffix:
        raise FieldError("suffix", "suffix: text cannot be filled in here, only continued")
    if asked.best_of is not None and asked.best_of != (asked.n or 1):
        raise FieldError("best_of", "best_of: must be n, or be left out")
    options = common.options_of(asked, answer_tokens)
    options["form"] = "text"
    options["logprobs"] = asked.logprobs
    if asked.max_tokens is None:
        options["sampling"] = {**(options["sampling"] or {}), "fit": True}
    choices = asked.n or 1
    echoed = [prompt for prompt in prompts for _ in range(choices)] if asked.echo else []
    ask = Ask(prompts[0], options, choices, tuple(prompts[1:]))
    renderer = Completions(echoed, len(prompts), usage=common.wants_usage(asked)) if asked.stream else None
    made: Callable[[About, list[Answer]], Any] = partial(whole, echoed, len(prompts))
    return Prepared(ask, renderer, made)


class Completions:
    """The stream."""

    def __init__(self, echoed: list[str], prompts: int, *, usage: bool) -> None:
        self._echoed, self._prompts, self._usage = echoed, prompts, usage
        self._about = About("", 0, "")
        self._offsets: dict[int, int] = {}

    def begin(self, about: About) -> Iterable[Event]:
        self._about = about
        return [self._chunk(choice, text) for choice, text in enumerate(self._echoed)]

    def token(self, token: Token) -> Iterable[Event]:
        if token.logprob is None:
            return [self._chunk(token.choice, token.text)] if token.text else []
        at = self._offsets.get(token.choice, 0)
        self._offsets[token.choice] = at + len(token.text)
        told = {
            "tokens": [token.piece.decode(errors="replace")],
            "token_logprobs": [token.logprob.logprob],
            "top_logprobs": [_top(token.logprob.top)],
            "text_offset": [at],
        }
        return [self._chunk(token.choice, token.text, logprobs=told)]

    def end(self, choice: int, answer: Answer) -> Iterable[Event]:
        return [self._chunk(choice, "", finish=common.ending(answer))]

    def done(self, answers: list[Answer]) -> Iterable[Event]:
        if self._usage:
            told = {"choices": [], "usage": common.usage(answers, self._prompts), "llambo": common.story(answers)}
            yield Event(encode({**_head(self._about), **told}))
        yield Event(b"[DONE]")

    def failed(self, error: LlamboError) -> Iterable[Event]:
        return [Event(encode(body(error, "openai")))]

    def _chunk(
        self, choice: int, text: str, *, logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> Event:
        told = {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return Event(encode({**_head(self._about), "choices": [told]}))


def whole(echoed: list[str], prompts: int, about: About, answers: list[Answer]) -> dict[str, Any]:
    return {
        **_head(about),
        "choices": [
            {"index": number, "text": (echoed[number] if echoed else "") + answer.text,
             "logprobs": _logprobs(answer), "finish_reason": common.ending(answer)}
            for number, answer in enumerate(answers)
        ],
        "usage": common.usage(answers, prompts),
        "llambo": common.story(answers),
    }  # fmt: skip


def _head(about: About) -> dict[str, Any]:
    return {"id": f"cmpl-{about.id}", "object": "text_completion", "created": about.created, "model": about.model}


def _logprobs(answer: Answer) -> dict[str, Any] | None:
    if not answer.logprobs:
        return None
    texts = [piece.decode(errors="replace") for piece in answer.pieces]
    offsets, at = [], 0
    for text in texts:
        offsets.append(at)
        at += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [each.logprob if each else None for each in answer.logprobs],
        "top_logprobs": [_top(each.top) if each else {} for each in answer.logprobs],
        "text_offset": offsets,
    }


def _top(top: Iterable[Any]) -> dict[str, float]:
    return {each.piece.decode(errors="replace"): each.logprob for each in top}
