"""The gateway's metrics for Prometheus: HTTP requests, and answers.

The values of labels are bounded: routes that exist, methods and codes from closed lists, and models that the mesh has
named in an answer. Anything else that a caller may send becomes "other".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llambo.gateway.answers.feed import Arrival, Feed, Observer
from llambo.mesh.service import host, prometheus
from llambo.mesh.service.prometheus import OTHER, WAITS_S, Family, Metric, Names, Scalar

#: Models that get a label of their own, until the gateway restarts.
MODELS = 64
_METHODS = ("GET", "POST", "DELETE", "OPTIONS", "HEAD", "PUT", "PATCH")

REQUESTS = Metric("llambo_gateway_http_requests_total", "counter",
                  "HTTP requests by class of status; `none` if the client disconnected before there was a status",
                  ("api", "route", "method", "status"))  # fmt: skip
LASTED = Metric("llambo_gateway_http_request_seconds", "histogram",
                "Time from the head of a request to the end of its response", ("api", "route"), WAITS_S)  # fmt: skip
REFUSED = Metric("llambo_gateway_errors_total", "counter",
                 "Requests answered with an error, also one in the middle of a stream, by its code",
                 ("api", "code"))  # fmt: skip
FIRST = Metric("llambo_gateway_first_token_seconds", "histogram", "Time from submission to first token",
               ("model",), WAITS_S)  # fmt: skip
ANSWERED = Metric("llambo_gateway_answer_seconds", "histogram", "Time from submission to the end of an answer",
                  ("model",), WAITS_S)  # fmt: skip
TOKENS = Metric("llambo_gateway_tokens_total", "counter", "Tokens received from the mesh", ("model",))
ENDED = Metric("llambo_gateway_answers_ended_total", "counter",
               "Answers that ended, by finish reason or error code", ("model", "reason"))  # fmt: skip
RESUMED = Metric("llambo_gateway_resumed_total", "counter", "Streams that a client has resumed")
HUNG_UP = Metric(
    "llambo_gateway_disconnects_total", "counter", "Clients that disconnected before their answer was complete"
)
OPEN = Metric("llambo_gateway_http_open", "gauge", "Open HTTP requests")
SOCKETS = Metric("llambo_gateway_websockets_open", "gauge", "Open WebSockets")
ANSWERS = Metric("llambo_gateway_answers_open", "gauge", "Answers in progress, also those without a reader")
READERS = Metric("llambo_gateway_readers", "gauge", "Connections that are reading an answer")
LIMIT = Metric("llambo_gateway_http_limit", "gauge", "Limit on open HTTP requests")
TABLE = (REQUESTS, LASTED, REFUSED, FIRST, ANSWERED, TOKENS, ENDED, RESUMED, HUNG_UP, OPEN, SOCKETS, ANSWERS,
         READERS, LIMIT)  # fmt: skip


@dataclass(slots=True)
class _OpenFeed:
    began_at: float
    #: It was begun here: the time to its first token is known.
    fresh: bool
    #: How many of its tokens are counted.
    counted: int = 0


class GatewayMetrics(Observer):
    """`clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._models = Names(MODELS)
        #: Set by the middleware.
        self.open = self.sockets = self.limit = 0
        self._feeds: dict[Feed, _OpenFeed] = {}
        self._requests, self._lasted, self._refused = REQUESTS.scalars(), LASTED.histograms(), REFUSED.scalars()
        self._first, self._answered = FIRST.histograms(), ANSWERED.histograms()
        self._tokens, self._ended = TOKENS.scalars(), ENDED.scalars()
        self._resumed, self._disconnected = RESUMED.scalars(), HUNG_UP.scalars()

    def http_request(self, route: str, method: str, status: int, seconds: float, code: str) -> None:
        """`route`: its pattern; empty: no such route. `code`: of the error it was answered with, if any."""
        api, route = api_of(route), route or OTHER
        method = method if method in _METHODS else OTHER
        self._requests.at(api, route, method, f"{status // 100}xx" if status else prometheus.NONE).value += 1
        self._lasted.at(api, route).observe(seconds)
        if code:
            self._refused.at(api, code).value += 1

    # The observer.

    def began(self, feed: Feed, arrival: Arrival | None) -> None:
        self._feeds[feed] = _OpenFeed(self._clock(), fresh=arrival is not None)

    def first_token(self, feed: Feed) -> None:
        model = self._model(feed)
        if self._feeds[feed].fresh:
            self._first.at(model).observe(self._clock() - self._feeds[feed].began_at)

    def ended(self, feed: Feed) -> None:
        self._count(feed)
        model = self._model(feed)
        self._answered.at(model).observe(self._clock() - self._feeds.pop(feed).began_at)
        if feed.error is not None:
            self._ended.at(model, feed.error.code.value).value += 1
        for answer in feed.answers.values():
            self._ended.at(model, answer.reason).value += 1

    def resumed(self) -> None:
        self._resumed.one.value += 1

    def disconnected(self) -> None:
        self._disconnected.one.value += 1

    def _count(self, feed: Feed) -> None:
        tokens = len(feed.tokens.ids) - len(feed.answers)  # the end of each choice is an entry as well
        self._tokens.at(self._model(feed)).value += tokens - self._feeds[feed].counted
        self._feeds[feed].counted = tokens

    def _model(self, feed: Feed) -> str:
        """Known once the mesh has accepted the request."""
        model = feed.accepted_model
        if model:
            self._models.learn(model)
        return self._models.of(model) if model else OTHER

    def page(self) -> str:
        for feed in self._feeds:
            self._count(feed)
        families: list[Family[Any]] = [
            self._requests, self._lasted, self._refused, self._first, self._answered, self._tokens, self._ended,
            self._resumed, self._disconnected,
        ]  # fmt: skip
        now = {OPEN: self.open, SOCKETS: self.sockets, ANSWERS: len(self._feeds), LIMIT: self.limit,
               READERS: sum(feed.readers for feed in self._feeds)}  # fmt: skip
        families += [_gauge(metric, number) for metric, number in now.items()]
        return prometheus.page(families) + host.process_metrics_page()


def api_of(route: str) -> str:
    """The value of the label `api`."""
    if route.endswith(("/rerank", "/reranking")):
        return "rerank"
    if not route.startswith("/v1/"):
        return "own"
    return "anthropic" if route.startswith("/v1/messages") else "own" if route == "/v1/stream" else "openai"


def _gauge(metric: Metric, value: float) -> Family[Scalar]:
    family = metric.scalars()
    family.one.value = value
    return family
