"""What is measured while requests live, for the metrics: times, tokens, and why things ended.

The path of tokens pays nothing for it. What follows from a transcript is computed when the metrics are read; a first
token is one that was waited for; and the pauses between tokens are taken of `TIMED` streams at a time, whose chunks are
looked at one by one. In a small mesh these are all there are, in a large one a sample: the next is the stream that
begins when one of them ends.

Labels are what workers serve, their node classes, and closed lists. A name that only clients have used is "other".
"""

from __future__ import annotations

from typing import Any, get_args

from llambo.broker.records.registry import WorkerEntry
from llambo.broker.records.request import Request
from llambo.mesh.service.prometheus import OTHER, PAUSES_S, WAITS_S, Family, Histogram, Metric, Names, Scalar
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import ErrorInfo

#: Names of models and of node classes that get a label of their own, until the broker is started again.
MODELS, CLASSES = 64, 16
#: Streams whose every pause is taken.
TIMED = 4

_PACE = ("model", "class")
QUEUED = Metric("llambo_broker_queue_seconds", "histogram", "How long a request waited for a worker, each time it did",
                ("model", "priority"), WAITS_S)  # fmt: skip
FIRST = Metric("llambo_broker_first_token_seconds", "histogram", "From a request's arrival to its first token",
               _PACE, WAITS_S)  # fmt: skip
PAUSE = Metric("llambo_broker_inter_token_seconds", "histogram",
               f"Time to each further token, of up to {TIMED} streams at a time; tokens of one chunk share its pause",
               _PACE, PAUSES_S)  # fmt: skip
PREFILL = Metric("llambo_broker_prefill_seconds", "histogram", "How long an engine read a prompt, as it says",
                 _PACE, WAITS_S)  # fmt: skip
LASTED = Metric("llambo_broker_request_seconds", "histogram", "From a request's arrival to its end",
                ("model", "priority"), WAITS_S)  # fmt: skip
TOKENS = Metric("llambo_broker_tokens_total", "counter", "Tokens that workers have made for requests of this broker",
                _PACE)  # fmt: skip
PROMPT = Metric("llambo_broker_prompt_tokens_total", "counter", "Tokens of prompts, of requests that a worker ended",
                _PACE)  # fmt: skip
CACHED = Metric("llambo_broker_cached_tokens_total", "counter", "Those of them that a worker had in its cache", _PACE)
ENDED = Metric("llambo_broker_requests_ended_total", "counter", "Requests that ended, by reason", ("model", "reason"))
ERRORS = Metric("llambo_broker_request_errors_total", "counter", "Those of them that failed, by error", ("code",))
MOVES = Metric("llambo_broker_moves_total", "counter", "Times a request went on at another worker", ("model",))
REFUSED = Metric("llambo_broker_refusals_total", "counter",
                 "Requests that were not taken in: the code of the error, or the limit that it met",
                 ("reason",))  # fmt: skip
LOADS = Metric("llambo_broker_model_loads_total", "counter", "Models that a host has loaded", ("model",))
LOAD_FAILURES = Metric("llambo_broker_model_load_failures_total", "counter",
                       "Loads that have failed at a host, or models that it cannot load", ("model",))  # fmt: skip
UNLOADS = Metric("llambo_broker_model_unloads_total", "counter",
                 "Models that a host has unloaded, for others or because nothing used them", ("model",))  # fmt: skip
LOADING = Metric("llambo_broker_model_load_seconds", "histogram", "How long a host loaded a model, as it says",
                 ("model",), WAITS_S)  # fmt: skip
TABLE = (QUEUED, FIRST, PAUSE, PREFILL, LASTED, TOKENS, PROMPT, CACHED, ENDED, ERRORS, MOVES, REFUSED,
         LOADS, LOAD_FAILURES, UNLOADS, LOADING)  # fmt: skip


_PRIORITIES, _REASONS = get_args(m.Priority), get_args(m.Reason)


class ModelCells:
    """Where the numbers of one model go, for all classes of workers."""

    __slots__ = ("ended", "lasted", "moves", "queued")

    def __init__(self, meter: Meter, model: str) -> None:
        self.queued = {priority: meter.spread(QUEUED, model, priority) for priority in _PRIORITIES}
        self.lasted = {priority: meter.spread(LASTED, model, priority) for priority in _PRIORITIES}
        self.ended = {reason: meter.number(ENDED, model, reason) for reason in _REASONS}
        self.moves = meter.number(MOVES, model)


class Pace:
    """Where those of one model go at one class of workers."""

    __slots__ = ("cached", "first", "model", "pause", "prefill", "prompt", "tokens")

    def __init__(self, meter: Meter, model: ModelCells, *labels: str) -> None:
        self.model = model
        self.first, self.pause, self.prefill = (meter.spread(one, *labels) for one in (FIRST, PAUSE, PREFILL))
        self.tokens, self.prompt, self.cached = (meter.number(one, *labels) for one in (TOKENS, PROMPT, CACHED))


class Meter:
    def __init__(self) -> None:
        self.models = Names(MODELS)
        self.classes = Names(CLASSES)
        #: How many streams have their pauses taken now.
        self.timed = 0
        self.families: dict[str, Family[Any]] = {
            metric.name: metric.histograms() if metric.kind == "histogram" else metric.scalars() for metric in TABLE
        }
        #: By the names themselves, which are looked up for each request. Only those that have labels are in here.
        self._paces: dict[tuple[str, str], Pace] = {}
        self._cells: dict[str, ModelCells] = {}

    def number(self, metric: Metric, *labels: str) -> Scalar:
        cell: Scalar = self.families[metric.name].at(*labels)
        return cell

    def spread(self, metric: Metric, *labels: str) -> Histogram:
        cell: Histogram = self.families[metric.name].at(*labels)
        return cell

    def learn(self, worker: WorkerEntry) -> None:
        """Only a worker that serves a model can make its name a label."""
        self.classes.learn(worker.hello.node_class)
        for model in worker.serving.models:
            self.models.learn(model)

    # --- the life of a request -----------------------------------------------------------------------------

    def refused(self, reason: str) -> None:
        self.number(REFUSED, reason).value += 1

    def dispatched(self, request: Request, node_class: str, now_ms: int) -> None:
        pace = request.measured.pace = self._pace(request.model, node_class)
        pace.model.queued[request.asked.priority].observe((now_ms - request.place.queued_at) / 1000)
        if request.task == "generate":
            have = request.measured.counted = request.transcript.next_index
            if not have:
                request.measured.first_awaited = request.watched = True

    def adopted(self, request: Request, node_class: str) -> None:
        """What it had already was made for another broker, or for us in a former life."""
        request.measured.pace = self._pace(request.model, node_class)
        if request.task == "generate":
            request.measured.counted = request.transcript.next_index

    def chunk_arrived(self, request: Request, now_ms: int) -> None:
        """It has more tokens, and is one whose times are taken."""
        measured, have = request.measured, request.transcript.next_index
        if not have or measured.pace is None:
            return
        if measured.first_awaited:
            measured.first_awaited = False
            measured.first_ms = now_ms - request.submitted_at
            measured.pace.first.observe(measured.first_ms / 1000)
            if self.timed < TIMED:
                self.timed += 1
                measured.timed_index, measured.timed_at = have, now_ms
            request.update_watched()
        elif have > measured.timed_index:
            more = have - measured.timed_index
            measured.pace.pause.observe((now_ms - measured.timed_at) / 1000 / more, more)
            measured.timed_index, measured.timed_at = have, now_ms

    def count(self, request: Request) -> None:
        """Count the tokens it has, under the model and class that it runs at."""
        measured = request.measured
        more = request.transcript.next_index - measured.counted
        if more > 0 and measured.pace is not None and request.task == "generate":
            measured.pace.tokens.value += more
            measured.counted += more

    def moved(self, request: Request) -> None:
        self._of_model(request.model).moves.value += 1

    def left(self, request: Request) -> None:
        """It is no request of this broker any more."""
        self.count(request)
        if request.measured.timed_at >= 0:
            request.measured.timed_at = -1
            self.timed -= 1

    def ended(self, request: Request, reason: m.Reason, error: ErrorInfo | None, usage: m.Usage, now_ms: int) -> None:
        pace = request.measured.pace
        cells = pace.model if pace is not None else self._of_model(request.model)
        cells.ended[reason].value += 1
        cells.lasted[request.asked.priority].observe((now_ms - request.submitted_at) / 1000)
        if error is not None:
            self.number(ERRORS, error.code.value).value += 1
        if pace is not None and usage.prompt_tokens:
            pace.prompt.value += usage.prompt_tokens
            pace.cached.value += usage.cached_tokens
            pace.prefill.observe(usage.prefill_ms / 1000)

    # --- models at hosts -------------------------------------------------------------------------------------

    def model_loaded(self, model: str, load_ms: int) -> None:
        self.number(LOADS, self.models.of(model)).value += 1
        if load_ms:
            self.spread(LOADING, self.models.of(model)).observe(load_ms / 1000)

    def load_failed(self, model: str) -> None:
        self.number(LOAD_FAILURES, self.models.of(model)).value += 1

    def model_unloaded(self, model: str) -> None:
        self.number(UNLOADS, self.models.of(model)).value += 1

    # --- where it goes ---------------------------------------------------------------------------------------

    def _of_model(self, model: str) -> ModelCells:
        cells = self._cells.get(model)
        if cells is None:
            label = self.models.of(model)
            cells = ModelCells(self, label)
            if label != OTHER:
                self._cells[model] = cells
        return cells

    def _pace(self, model: str, node_class: str) -> Pace:
        pace = self._paces.get((model, node_class))
        if pace is None:
            labels = (self.models.of(model), self.classes.of(node_class))
            pace = Pace(self, self._of_model(model), *labels)
            if OTHER not in labels:
                self._paces[model, node_class] = pace
        return pace
