"""Keys as the commands see them: which one is meant, and a broker that must not listen without any."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llambo.cli.kit.exits import Exit
from llambo.cli.kit.failure import Failure

if TYPE_CHECKING:
    from llambo.mesh.security.keyring import Folder
    from llambo.mesh.settings.settings import Settings
    from llambo.mesh.wire.identity import PeerKey

#: The key of workers that `llambo up` starts, and what they are called before the dash.
WORKERS = "worker"
#: What the gateway's own key is called.
GATEWAY = "gateway"


def key_of(settings: Settings) -> PeerKey | None:
    """The key of a client or a worker, if one was given."""
    from llambo.mesh.security import keys

    return keys.find(settings.text("key"), os.environ)


def address_of(settings: Settings, key: PeerKey | None) -> str:
    """Where the broker is: in the key, unless somebody has said otherwise."""
    if key is not None and settings.sources["broker"] == "default":
        return key.address
    return settings.text("broker")


def folder_of(settings: Settings, host: str) -> Folder | None:
    """The broker's keys. Without any it listens on this machine alone."""
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
        f"without keys a broker listens on this machine alone, and {host} is more than that",
        f"{begin}llambo-broker --bind {host} --keys {there}",
        Exit.USAGE,
    )


def gateway_folder(settings: Settings) -> Folder | None:
    """Keys and API tokens. Beyond this machine there is no gateway without them, nor one that does not encrypt."""
    from llambo.mesh.link.sockets import is_loopback
    from llambo.mesh.security.keyring import Folder, default_folder

    host, path = settings.text("http_bind"), settings.text("http_keys")
    if not is_loopback(host):
        if not path:
            text = f"without keys a gateway listens on this machine alone, and {host} is more than that"
            raise Failure(
                text, f"llambo gateway --http-bind {host} --http-keys {default_folder(os.environ)}", Exit.USAGE
            )
        if not settings.text("tls_cert") and not settings.switch("http_plain"):
            text = f"on {host} API tokens and answers would travel for everybody to read"
            hint = "--tls-cert FILE --tls-key FILE, or --http-plain yes if a proxy in front of it has TLS"
            raise Failure(text, hint, Exit.USAGE)
    if not path:
        return None
    folder = Folder(Path(path).expanduser())
    if not folder.exists:
        raise Failure(f"there are no keys in {folder.path}", f"llambo keys init --keys {folder.path}", Exit.USAGE)
    return folder


def gateway_key(folder: Folder) -> PeerKey:
    """The gateway's own, for what nobody in particular asks; it is made if there is none yet."""
    from llambo.mesh.wire.identity import Identity

    if not folder.ring().named(GATEWAY):
        folder.add(Identity(GATEWAY, "client"), int(time.time()))
    return folder.export(GATEWAY)


def worker_key(folder: Folder) -> Path:
    """The file with the key of workers called worker-1, worker-2 and so on; it is made if there is none yet."""
    from llambo.mesh.security.keyring import ISSUED
    from llambo.mesh.wire.identity import Identity

    if not folder.ring().named(WORKERS):
        folder.add(Identity(WORKERS, "worker"), int(time.time()))
    return folder.path / ISSUED / f"{WORKERS}.key"
