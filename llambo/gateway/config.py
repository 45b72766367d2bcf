"""The settings of a gateway, as one immutable value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from llambo.mesh.settings.settings_table import Value


class GatewayConfig(msgspec.Struct, frozen=True):
    host: str = "127.0.0.1"
    port: int = 0
    tls_cert: str = ""
    tls_key: str = ""
    #: Origins whose pages may use it.
    cors: tuple[str, ...] = ()
    #: Without keys: names of the gateway besides those of this host.
    hosts: tuple[str, ...] = ()
    body_bytes: int = 8 * 1024 * 1024
    answer_tokens: int = 2_048
    resume_ms: int = 5_000
    http_requests: int = 4_096
    http_unread_bytes: int = 64 * 1024 * 1024
    leave_ms: int = 30_000

    @classmethod
    def from_settings(cls, values: Mapping[str, Value]) -> GatewayConfig:
        found: dict[str, Any] = {name: values[name] for name in cls.__struct_fields__ if name in values}
        found |= {"host": values["http_bind"], "port": values["http_port"]}
        found |= {"cors": _words(values["http_cors"]), "hosts": _words(values["http_hosts"])}
        return msgspec.convert(found, type=cls)


def _words(value: Value) -> tuple[str, ...]:
    return tuple(word.strip() for word in str(value).split(",") if word.strip())
