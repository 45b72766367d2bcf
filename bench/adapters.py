"""Two adapters and the base in one engine: does each of 12 streams say what it says alone, and how fast are they.

Texts at temperature 0 are compared with those of the same requests one at a time, in an engine that has just started.
The last digits of a logit depend on what else is in its step, so the base alone is compared in the same way, and for
each text that differs it is shown how far apart the two likeliest tokens were where it first does.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import lora
from bench.engine import Child
from bench.streams import prompt
from llambo.mesh.service.host import physical_cores
from llambo.mesh.wire.messages import Sampling
from llambo.mesh.wire.tokens import Logprob
from llambo.worker.config import Adapter, LlamaOptions
from llambo.worker.engine import protocol as proto
from llambo.worker.models import model_files

BASE, NAMES, STREAMS = "smollm2", ("pirate", "poet"), 12
MODELS = (BASE, *(f"{BASE}+{name}" for name in NAMES))
GREEDY = Sampling(form="user", temperature=0.0, ignore_eos=True)


@dataclass
class Text:
    model: str
    ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)


def run(child: Child, models: list[str], numbers: list[int], tokens: int) -> list[Text]:
    """These streams at once."""
    texts: dict[bytes, Text] = {}
    for number in numbers:
        key, model = (number + 1).to_bytes(24, "big"), models[number % len(models)]
        texts[key] = Text(model)
        asked = prompt(number, number).encode()
        child.order(proto.Start(key, asked, tokens, 1, sampling=GREEDY, model=model, logprobs=2))
    ended = 0
    while ended < len(numbers):
        message = child.receive()
        if isinstance(message, proto.Refused):
            raise SystemExit(message.error.text)
        for output in message.outputs if isinstance(message, proto.Step) else ():
            texts[output.key].ids += output.ids
            texts[output.key].logprobs += output.logprobs or []
            ended += output.end is not None
    return list(texts.values())


def compare(options: LlamaOptions, models: list[str], tokens: int) -> str:
    numbers = list(range(STREAMS))
    alone, together = Child(options), Child(options)
    try:
        single = [run(alone, models, [number], tokens)[0] for number in numbers]
        crowd = run(together, models, numbers, tokens)
    finally:
        alone.close()
        together.close()
    gaps = []
    for one, other in zip(single, crowd, strict=True):
        at = next((at for at, pair in enumerate(zip(one.ids, other.ids, strict=True)) if pair[0] != pair[1]), None)
        if at is not None:
            likely = [top.logprob for top in one.logprobs[at].top]
            gaps.append(f"{one.model} at token {at}: {likely[0] - likely[1]:.3f}")
    return f"{STREAMS - len(gaps)} of {STREAMS} texts are the same" + "".join(f"; {gap}" for gap in gaps)


def speed(child: Child, models: list[str], tokens: int) -> str:
    """A second, and in processor time of the engine, which other work on the machine changes less."""
    began, used = time.perf_counter(), child.processor_s()
    count = sum(len(text.ids) for text in run(child, models, list(range(STREAMS)), tokens))
    took, used = time.perf_counter() - began, child.processor_s() - used
    return f"{count / took:.1f} tokens/s, {used / count * 1000:.1f} ms of processor time for a token"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench adapters", description=__doc__)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args(arguments)
    plain = LlamaOptions(slots=STREAMS, context=512, threads=args.threads)
    with TemporaryDirectory() as folder:
        files = [lora.write(Path(folder, f"{name}.gguf"), model_files.find(BASE), at) for at, name in enumerate(NAMES)]
        adapters = tuple(Adapter(*each) for each in zip(NAMES, map(os.fspath, files), strict=True))
        several = replace(plain, adapters=adapters)
        print(f"base alone: {compare(plain, [BASE], args.tokens)}", flush=True)
        print(f"base and {len(NAMES)} adapters: {compare(several, list(MODELS), args.tokens)}", flush=True)
        child = Child(several)
        try:
            for what, models in (("base", [BASE]), ("one adapter", [MODELS[1]]), ("base and two", list(MODELS))):
                print(f"{STREAMS} streams, {what}: {speed(child, models, args.tokens)}", flush=True)
        finally:
            child.close()
    return 0
