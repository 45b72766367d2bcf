"""Whether answers are traced, and where to.

Nothing is traced unless the standard variables of OpenTelemetry say where to (`OTEL_EXPORTER_OTLP_ENDPOINT`, or
`OTEL_TRACES_EXPORTER=otlp` for a collector on this machine). Then the extra `otel` has to be installed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from llambo.gateway.observe.spans import Value
from llambo.mesh.wire.errors import Code, LlamboError

if TYPE_CHECKING:
    from llambo.gateway.answers.feed import Feed

log = logging.getLogger(__name__)


class Traces(Protocol):
    def follow(self, feed: Feed, name: str, headers: Mapping[str, str], about: Mapping[str, Value]) -> None:
        """Trace it from its begin, which is now, to its end."""

    async def close(self) -> None:
        """Send what is known."""


def traces_of(environ: Mapping[str, str]) -> Traces | None:
    """As the variables want it. Raises LlamboError if they want what is not here."""
    named = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    where = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or named == "none" or not (where or named):
        return None
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if named not in ("", "otlp") or protocol not in (None, "", "http/protobuf"):
        text = f"traces are sent by OTLP over HTTP alone, not by {named or 'otlp'} over {protocol or 'http/protobuf'}"
        raise LlamboError(Code.BAD_SETTING, text)
    try:
        from llambo.gateway.observe import otel  # noqa: PLC0415  # whoever wants no traces need not have it
    except ImportError as error:
        text = f"traces are wanted (OTEL_...), and a package for them is missing: {error.name}"
        raise LlamboError(Code.BAD_SETTING, f"{text}; pip install 'llambo[otel]'") from error
    log.info("traces are sent to %s", where or "the collector on this machine")
    is_named = "OTEL_SERVICE_NAME" in environ or "service.name" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return otel.sender(is_named)
