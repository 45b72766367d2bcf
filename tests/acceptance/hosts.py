"""Three hosts, each a network of its own: a broker, a worker and a client, set up as the documentation describes.

`python -m tests.acceptance.hosts FOLDER` runs inside a network of its own (see test_hosts.py), where it may capture
the packets between the others. It prints the result as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from tests.chaos import places

BIN = Path(sys.executable).parent
PROMPT = "the canary sings at noon"
READY_S, DONE_S = 60.0, 60.0
ETH_P_ALL = 3


class Capture:
    """All packets that pass through the interfaces of this network, until it is closed."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._socket.settimeout(0.2)
        self._over = threading.Event()
        self.bytes = bytearray()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while not self._over.is_set():
            try:
                self.bytes += self._socket.recv(65_536)
            except TimeoutError:
                continue

    def close(self) -> bytes:
        self._over.set()
        self._thread.join()
        self._socket.close()
        return bytes(self.bytes)


def llambo(*words: str, prefix: list[str] | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [*(prefix or []), str(BIN / "llambo"), *words],
        check=False, capture_output=True, text=True, timeout=DONE_S, env={**os.environ, **(env or {})},
    )  # fmt: skip
    assert done.returncode == 0, f"llambo {' '.join(words)}: {done.stderr}"
    return done.stdout


def start(log: Path, *command: str) -> subprocess.Popen[bytes]:
    """Start a service and wait until it has written to its pipe that it is ready."""
    ours, theirs = os.pipe()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--notify-fd", str(theirs), "--parent", str(os.getpid())],
            stdout=out, stderr=out, pass_fds=[theirs],
        )  # fmt: skip
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        alarm = threading.Timer(READY_S, process.kill)
        alarm.start()
        ready = pipe.readline()
        alarm.cancel()
    assert ready, f"{command} was not ready: {log.read_text()}"
    return process


def play(folder: Path) -> dict[str, object]:
    places.settle()
    hosts = {name: places.Namespace(number) for number, name in enumerate(("box", "gpu", "laptop"))}
    box = "10.77.0.2"
    # The hosts reach each other through this network: that is where the packets are captured.
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    for number, host in enumerate(hosts.values()):
        route = [*host.prefix, "ip", "route", "add", "default", "via", f"10.77.{number}.1"]
        subprocess.run(route, check=True, capture_output=True, timeout=DONE_S)
    # On the box
    place = folder / "keys"
    llambo("keys", "init", "--address", f"tcp://{box}:7330", "--keys", str(place))
    llambo("keys", "add", "gpu", "--role", "worker", "--keys", str(place))
    llambo("keys", "add", "laptop", "--role", "client", "--keys", str(place))
    llambo("keys", "export", "gpu", "--keys", str(place), "--output", str(folder / "gpu.key"))
    line = llambo("keys", "export", "laptop", "--keys", str(place)).strip()
    capture = Capture()
    broker = start(folder / "broker.log", *hosts["box"].prefix, str(BIN / "llambo-broker"),
                   "--bind", "0.0.0.0", "--keys", str(place))  # fmt: skip
    worker = start(folder / "worker.log", *hosts["gpu"].prefix, str(BIN / "llambo-worker"), "--engine", "fake",
                   "--key", str(folder / "gpu.key"))  # fmt: skip
    try:
        answer = llambo("send", PROMPT, "--max-tokens", "40", "--seed", "3", prefix=hosts["laptop"].prefix,
                      env={"LLAMBO_KEY": line})  # fmt: skip
        stranger = subprocess.run(
            [*hosts["laptop"].prefix, str(BIN / "llambo"), "--broker", f"tcp://{box}:7330", "send", PROMPT],
            check=False, capture_output=True, text=True, timeout=DONE_S,
        )  # fmt: skip
    finally:
        for process in (worker, broker):
            process.send_signal(signal.SIGTERM)
            process.wait(DONE_S)
        seen = capture.close()
        for host in hosts.values():
            host.close()
    words = [word for word in answer.split() if len(word) > 3]
    texts = {"the prompt": PROMPT, "the answer": " ".join(answer.split()[:4]), "a message": "inference_request",
            "another": "worker_hello", "a word of the prompt": "canary"}  # fmt: skip
    return {
        "answer": answer.strip(), "words": len(words), "captured": len(seen),
        "plaintext": [what for what, text in texts.items() if text.encode() in seen],
        "curve": b"CURVE" in seen, "stranger": [stranger.returncode, stranger.stderr.strip()],
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(play(Path(sys.argv[1]))))
