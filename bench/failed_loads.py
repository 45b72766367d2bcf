"""What loads that fail cost the requests for other models: first tokens and gaps of streams with and without them.

    python -m bench.failed_loads [--rounds 3] [--seconds 8] [--lanes 4]

A host has two models loaded, which streams use without a pause. In every second part somebody asks for models of which
each fails: `damaged`, whose file is missing when 20 % of it should be there, and `huge`, for which there is no memory.
All models are fake; broker, host and engines are processes. Also: what the ones who asked are answered, and after what
time. Parts alternate, so that what else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench.figures import quantile
from llambo import Client, LlamboError
from llambo.testing.mesh import Mesh

GOOD = ("one", "two")
#: Of each sort one for every try: a model that has failed is not tried again for a while.
TRIES = 40
#: No machine has it; the host is answered that this is its budget.
HUGE_MIB = 4_000_000_000
TOKENS = 20


@dataclass
class Part:
    first_ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    answered: list[tuple[float, str]] = field(default_factory=list)

    def line(self, name: str) -> str:
        return (
            f"{name}: {len(self.first_ms)} streams, first token p50 {quantile(self.first_ms, 0.5):.1f} ms, "
            f"p99 {quantile(self.first_ms, 0.99):.1f} ms; between tokens p99 {quantile(self.gaps_ms, 0.99):.1f} ms"
        )


async def streams(client: Client, model: str, until: float, part: Part) -> None:
    while time.monotonic() < until:
        last, first = time.monotonic(), True
        async with client.stream("x", model=model, max_tokens=TOKENS) as stream:
            while (piece := await stream.next_piece()) is not None:
                if piece.ids:
                    now = time.monotonic()
                    (part.first_ms if first else part.gaps_ms).append((now - last) * 1_000)
                    last, first = now, False


async def fail(client: Client, names: list[str], until: float, part: Part) -> None:
    """One failing load after the other."""
    while names and time.monotonic() < until:
        began = time.monotonic()
        try:
            await client.generate("x", model=names.pop(), max_tokens=1)
        except LlamboError as error:
            part.answered.append(((time.monotonic() - began) * 1_000, f"{error.code.value}: {error.text}"))
        else:
            raise AssertionError("a model that cannot be loaded has answered")


async def measure(address: str, options: argparse.Namespace) -> tuple[Part, Part]:
    parts = Part(), Part()
    bad = [[f"{sort}-{n}" for n in range(TRIES)] for sort in ("damaged", "huge")]
    async with Client(address) as client:
        while len(await client.models()) < 2 + 2 * TRIES:
            pass  # the host has not joined yet
        await asyncio.gather(*(client.generate("x", model=model, max_tokens=1) for model in GOOD))
        for turn in range(2 * options.rounds):
            part, until = parts[turn % 2], time.monotonic() + options.seconds
            async with asyncio.TaskGroup() as tasks:
                for lane in range(options.lanes):
                    tasks.create_task(streams(client, GOOD[lane % 2], until, part))
                for names in bad if turn % 2 else ():
                    tasks.create_task(fail(client, names, until, part))
    return parts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--lanes", type=int, default=4)
    options = parser.parse_args(arguments)
    models = [f"{name}:40" for name in GOOD]
    models += [f"damaged-{n}:40:200ms" for n in range(TRIES)] + [f"huge-{n}:{HUGE_MIB}:200ms" for n in range(TRIES)]
    with tempfile.TemporaryDirectory() as folder, Mesh(0, broker="process") as mesh:
        for name in (*GOOD, *(f"huge-{n}" for n in range(TRIES))):
            Path(folder, name).touch()
        words = ("--memory-bytes", f"{2 * HUGE_MIB}MiB", "--fake-load-file", f"{folder}/{{model}}",
                 "--fake-tokens-per-s", "200")  # fmt: skip
        mesh.spawn_host("box", ",".join(models), *words)
        without, beside = mesh.run(measure(mesh.address, options), 60 + 2 * options.rounds * (options.seconds + 30))
    print(without.line("failed_loads: without"))
    print(beside.line(f"failed_loads: beside {len(beside.answered)} failed loads"))
    p99s = quantile(beside.first_ms, 0.99), quantile(without.first_ms, 0.99)
    print(f"failed_loads: ratio of the p99 of first tokens {p99s[0] / p99s[1]:.2f}")
    for text in dict.fromkeys(text.replace("-39", "") for _, text in beside.answered[:2]):
        print(f"failed_loads: answered: {text}")
    print(f"failed_loads: answered after p50 {quantile([ms for ms, _ in beside.answered], 0.5):.0f} ms, "
          f"most {max(ms for ms, _ in beside.answered):.0f} ms")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
