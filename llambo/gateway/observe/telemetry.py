"""What the gateway counts, for Prometheus: requests as HTTP sees them, and answers as their readers do.

Labels are routes that exist, methods and codes from closed lists, and models that the mesh has named in an answer:
what a caller invents is "other".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from llambo.mesh.service import process_metrics, prometheus
from llambo.mesh.service.prometheus import OTHER, WAITS_S, Family, Metric, Names, Scalar

if TYPE_CHECKING:
    from llambo.gateway.answers.feed import Feed

#: Names of models that get a label of their own, until the gateway is started again.
MODELS = 64
_METHODS = ("GET", "POST", "DELETE", "OPTIONS", "HEAD", "PUT", "PATCH")

REQUESTS = Metric("llambo_gateway_http_requests_total", "counter",
                  "Requests over HTTP; their status is a class, or none if the client was gone before it",
                  ("api", "route", "method", "status"))  # fmt: skip
LASTED = Metric("llambo_gateway_http_request_seconds", "histogram",
                "From the head of a request to the end of its answer", ("api", "route"), WAITS_S)  # fmt: skip
REFUSED = Metric("llambo_gateway_errors_total", "counter",
                 "Requests that were answered with an error, by its code, also in the middle of a stream",
                 ("api", "code"))  # fmt: skip
FIRST = Metric("llambo_gateway_first_token_seconds", "histogram", "From the begin of an answer to its first token",
               ("model",), WAITS_S)  # fmt: skip
ANSWERED = Metric("llambo_gateway_answer_seconds", "histogram", "From the begin of an answer to its end",
                  ("model",), WAITS_S)  # fmt: skip
TOKENS = Metric("llambo_gateway_tokens_total", "counter", "Tokens that came for answers", ("model",))
ENDED = Metric("llambo_gateway_answers_ended_total", "counter",
               "Answers that ended, by reason, or by the code of an error", ("model", "reason"))  # fmt: skip
RESUMED = Metric("llambo_gateway_resumed_total", "counter", "Streams that a client came back to")
HUNG_UP = Metric("llambo_gateway_disconnects_total", "counter", "Clients that hung up before their answer was whole")
OPEN = Metric("llambo_gateway_http_open", "gauge", "Requests over HTTP that are open")
SOCKETS = Metric("llambo_gateway_websockets_open", "gauge", "WebSockets that are open")
ANSWERS = Metric("llambo_gateway_answers_open", "gauge", "Answers on their way, also those that nobody reads just now")
READERS = Metric("llambo_gateway_readers", "gauge", "Connections that read an answer")
LIMIT = Metric("llambo_gateway_http_limit", "gauge", "Requests that may be open")
TABLE = (REQUESTS, LASTED, REFUSED, FIRST, ANSWERED, TOKENS, ENDED, RESUMED, HUNG_UP, OPEN, SOCKETS, ANSWERS,
         READERS, LIMIT)  # fmt: skip


class Telemetry:
    """`clock`: seconds that only go forward."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.models = Names(MODELS)
        #: Kept by the front door.
        self.open = self.sockets = self.limit = 0
        self._requests, self._lasted, self._refused = REQUESTS.scalars(), LASTED.histograms(), REFUSED.scalars()
        self._first, self._answered = FIRST.histograms(), ANSWERED.histograms()
        self._tokens, self._ended = TOKENS.scalars(), ENDED.scalars()
        self._resumed, self._hung_up = RESUMED.scalars(), HUNG_UP.scalars()

    # --- as HTTP sees it -----------------------------------------------------------------------------------

    def answered(self, route: str, method: str, status: int, seconds: float, code: str) -> None:
        """`route`: its pattern; empty if there is none. `code`: of the error that was told, if one was."""
        api, route = api_of(route), route or OTHER
        method = method if method in _METHODS else OTHER
        self._requests.at(api, route, method, f"{status // 100}xx" if status else prometheus.NONE).value += 1
        self._lasted.at(api, route).observe(seconds)
        if code:
            self._refused.at(api, code).value += 1

    def hung_up(self) -> None:
        self._hung_up.one.value += 1

    def resumed(self) -> None:
        self._resumed.one.value += 1

    # --- answers -------------------------------------------------------------------------------------------

    def heard(self, feed: Feed) -> None:
        """Its first token is here."""
        model = self._model(feed)
        if not feed.resumed:
            self._first.at(model).observe(self.clock() - feed.began_at)

    def count(self, feed: Feed) -> None:
        have = len(feed.ids) - len(feed.answers)  # (the end of each choice stands among the tokens)
        self._tokens.at(self._model(feed)).value += have - feed.counted
        feed.counted = have

    def ended(self, feed: Feed) -> None:
        self.count(feed)
        model = self._model(feed)
        self._answered.at(model).observe(self.clock() - feed.began_at)
        if feed.error is not None:
            self._ended.at(model, feed.error.code.value).value += 1
        for answer in feed.answers.values():
            self._ended.at(model, answer.reason).value += 1

    def _model(self, feed: Feed) -> str:
        """As the mesh calls it: of a request that it has not accepted nobody knows."""
        model = feed.accepted_model
        if model:
            self.models.learn(model)
        return self.models.of(model) if model else OTHER

    # --- the page ------------------------------------------------------------------------------------------

    def page(self, feeds: Iterable[Feed]) -> str:
        live = [feed for feed in feeds if not feed.over]
        for feed in live:
            self.count(feed)
        families: list[Family[Any]] = [
            self._requests, self._lasted, self._refused, self._first, self._answered, self._tokens, self._ended,
            self._resumed, self._hung_up,
        ]  # fmt: skip
        now = {OPEN: self.open, SOCKETS: self.sockets, ANSWERS: len(live), LIMIT: self.limit,
               READERS: sum(feed.readers for feed in live)}  # fmt: skip
        families += [_one(metric, number) for metric, number in now.items()]
        return prometheus.page(families) + process_metrics.page()


def api_of(route: str) -> str:
    """Whose API a route belongs to."""
    if not route.startswith("/v1/"):
        return "own"
    return "anthropic" if route.startswith("/v1/messages") else "own" if route == "/v1/stream" else "openai"


def _one(metric: Metric, value: float) -> Family[Scalar]:
    family = metric.scalars()
    family.one.value = value
    return family
