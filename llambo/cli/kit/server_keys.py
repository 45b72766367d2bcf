"""The keys of what listens: a broker or a gateway that other hosts can reach does not start without them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llambo.cli.kit.failure import Exit, Failure

if TYPE_CHECKING:
    from llambo.mesh.security.keyring import Folder
    from llambo.mesh.settings.settings import Settings
    from llambo.mesh.wire.identity import PeerKey

#: The name of the key of workers that `llambo up` starts; the workers are named after it.
WORKERS = "worker"
#: The name of the gateway's own key.
GATEWAY = "gateway"


def folder_of(settings: Settings, host: str) -> Folder | None:
    """The broker's keys. Without keys it may only listen on loopback."""
    from llambo.mesh.link.sockets import is_loopback
    from llambo.mesh.security.keyring import Folder, default_folder

    path = settings.text("keys")
    if path:
        folder = Folder(Path(path).expanduser())
        if not folder.exists:
            raise Failure(f"there are no keys in {folder.path}", f"llambo keys init --keys {folder.path}", Exit.USAGE)
        return folder
    if is_loopback(host):
        return None
    there = default_folder(os.environ)
    begin = "" if Folder(there).exists else "llambo keys init --address tcp://THIS-HOST:7330\n  "
    raise Failure(
        f"without keys a broker listens on loopback only, and {host} is not a loopback address",
        f"{begin}llambo-broker --bind {host} --keys {there}",
        Exit.USAGE,
    )


def gateway_folder(settings: Settings) -> Folder | None:
    """Keys and API tokens. A gateway that listens beyond loopback needs them, and TLS."""
    from llambo.mesh.link.sockets import is_loopback
    from llambo.mesh.security.keyring import Folder, default_folder

    host, path = settings.text("http_bind"), settings.text("http_keys")
    if not is_loopback(host):
        if not path:
            text = f"without keys a gateway listens on loopback only, and {host} is not a loopback address"
            raise Failure(
                text, f"llambo gateway --http-bind {host} --http-keys {default_folder(os.environ)}", Exit.USAGE
            )
        if not settings.text("tls_cert") and not settings.switch("http_plain"):
            text = f"on {host} API tokens and answers would be sent unencrypted"
            hint = "--tls-cert FILE --tls-key FILE, or --http-plain yes if a proxy in front of it has TLS"
            raise Failure(text, hint, Exit.USAGE)
    if not path:
        return None
    folder = Folder(Path(path).expanduser())
    if not folder.exists:
        raise Failure(f"there are no keys in {folder.path}", f"llambo keys init --keys {folder.path}", Exit.USAGE)
    return folder


def gateway_key(folder: Folder) -> PeerKey:
    """The gateway's own key, for requests of its own. Created at the first call."""
    from llambo.mesh.wire.identity import Identity

    if not folder.ring().named(GATEWAY):
        folder.add(Identity(GATEWAY, "client"), int(time.time()))
    return folder.export(GATEWAY)


def worker_key(folder: Folder) -> Path:
    """The key file of the workers worker-1, worker-2 and so on. Created at the first call."""
    from llambo.mesh.security.keyring import ISSUED
    from llambo.mesh.wire.identity import Identity

    if not folder.ring().named(WORKERS):
        folder.add(Identity(WORKERS, "worker"), int(time.time()))
    return folder.path / ISSUED / f"{WORKERS}.key"
