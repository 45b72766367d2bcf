"""OpenAI's `/v1/completions`: the older API, which continues a text as it is, without a chat template."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from msgspec import Meta

from llambo.gateway.answers.api import AnswerHead, JsonObject, Parsed, StreamEvent, Submission, Token
from llambo.gateway.answers.api_errors import FieldError, error_body
from llambo.gateway.apis import openai_common as common
from llambo.mesh.client.answer_stream import Answer
from llambo.mesh.wire.errors import LlamboError
from llambo.mesh.wire.tokens import Logprob

#: Prompts of one request.
PROMPTS = 128


class CompletionRequest(common.OpenAIRequest, kw_only=True):
    prompt: str | list[Any]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


def inputs_of(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts: texts, or token ids that have to become texts first."""
    if not body.prompt and body.prompt != "":
        raise FieldError("prompt", "is empty")
    return common.texts_or_ids(body.prompt, "prompt", PROMPTS)


def parse(body: CompletionRequest, prompts: list[str], answer_tokens: int) -> Parsed:
    """`answer_tokens`: the longest answer if the caller sets no limit."""
    if body.suffix:
        raise FieldError("suffix", "is not supported: text can only be continued here")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise FieldError("best_of", "has to be equal to n, or absent")
    options = common.options_of(body, answer_tokens)
    options["form"] = "text"
    options["logprobs"] = body.logprobs
    if body.max_tokens is None:
        options["sampling"] = {**(options["sampling"] or {}), "fit": True}
    choices = body.n or 1
    echoed = [prompt for prompt in prompts for _ in range(choices)] if body.echo else []
    renderer = CompletionRenderer(echoed, len(prompts), usage=common.wants_usage(body))
    return Parsed(Submission(prompts[0], options, choices, tuple(prompts[1:])), renderer, bool(body.stream))


class CompletionRenderer:
    """`echoed`: the prompts, by choice, if they are to come before the answers."""

    def __init__(self, echoed: list[str], prompts: int, *, usage: bool) -> None:
        self._echoed, self._prompts, self._usage = echoed, prompts, usage
        self._head: JsonObject = {}
        self._offsets: dict[int, int] = {}

    def begin(self, head: AnswerHead) -> Iterable[StreamEvent]:
        self._head = {
            "id": f"cmpl-{head.id}",
            "object": "text_completion",
            "created": head.created,
            "model": head.model,
        }
        return [self._chunk(choice, text) for choice, text in enumerate(self._echoed)]

    def token(self, token: Token) -> Iterable[StreamEvent]:
        if token.logprob is None:
            return [self._chunk(token.choice, token.text)] if token.text else []
        at = self._offsets.get(token.choice, 0)
        self._offsets[token.choice] = at + len(token.text)
        return [self._chunk(token.choice, token.text, logprobs=_logprobs([token.piece], [token.logprob], at))]

    def end(self, choice: int, answer: Answer) -> Iterable[StreamEvent]:
        return [self._chunk(choice, "", finish=common.finish_reason(answer))]

    def done(self, answers: list[Answer]) -> Iterable[StreamEvent]:
        if self._usage:
            yield StreamEvent({**self._head, "choices": [], **common.totals(answers, self._prompts)})
        yield StreamEvent("[DONE]")

    def failed(self, error: LlamboError) -> Iterable[StreamEvent]:
        return [StreamEvent(error_body(error, "openai"))]

    def body(self, answers: list[Answer]) -> JsonObject:
        """Made of the answers: all that a stream adds to them is where it was cut."""
        choices = []
        for number, answer in enumerate(answers):
            text = (self._echoed[number] if self._echoed else "") + answer.text
            logprobs = _logprobs(answer.pieces, answer.logprobs) if answer.logprobs else None
            choices.append(_choice(number, text, logprobs, common.finish_reason(answer)))
        return {**self._head, "choices": choices, **common.totals(answers, self._prompts)}

    def _chunk(
        self, choice: int, text: str, *, logprobs: JsonObject | None = None, finish: str | None = None
    ) -> StreamEvent:
        return StreamEvent({**self._head, "choices": [_choice(choice, text, logprobs, finish)]})


def _choice(number: int, text: str, logprobs: JsonObject | None, finish: str | None) -> JsonObject:
    return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _logprobs(pieces: Sequence[bytes], logprobs: Sequence[Logprob | None], at: int = 0) -> JsonObject:
    """`at`: where in the text of the answer the first token begins."""
    texts = [piece.decode(errors="replace") for piece in pieces]
    offsets = []
    for text in texts:
        offsets.append(at)
        at += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [each.logprob if each else None for each in logprobs],
        "top_logprobs": [
            {top.piece.decode(errors="replace"): top.logprob for top in each.top} if each else {} for each in logprobs
        ],
        "text_offset": offsets,
    }
