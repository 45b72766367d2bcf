"""Adapters (LoRA): their names, which model a file belongs to, and what the broker makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import lora, tiny_model
from bench.tiny_model import STRING, U32, Entry, File
from llambo.gateway.answers.api_errors import FieldError
from llambo.mesh.client.request_options import build_request
from llambo.mesh.wire import limits, naming
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo, LlamboError
from llambo.mesh.wire.identity import Identity
from llambo.worker.agent.announcement import Announcement, ProcessIdentity
from llambo.worker.agent.engine_life import EngineLife
from llambo.worker.config import Adapter, FakeOptions, LlamaOptions, WorkerConfig
from llambo.worker.engine.fake import FakeEngine
from llambo.worker.engine.protocol import Output, Start
from llambo.worker.models import adapters, model_files
from llambo.worker.models.adapters import BadAdapter
from tests import bert
from tests.unit.broker_bench import Bench, Client, Worker
from tests.unit.test_api_answers import parsed

BASE = "llama-8-64-4096-f16-" + "a" * 32 + "-" + "b" * 8


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_model.whole())
    return path


# --- names ---


def test_the_name_of_an_adapter_stands_between_model_and_class() -> None:
    assert naming.with_adapter("smollm2", "pirate") == "smollm2+pirate"
    assert naming.with_adapter("smollm2@tiny", "pirate") == "smollm2+pirate@tiny"
    assert naming.with_adapter("", "pirate") == "+pirate"
    assert naming.with_adapter("smollm2", "") == "smollm2"
    assert naming.without_adapter("smollm2+pirate@tiny") == "smollm2@tiny"
    assert naming.without_adapter("smollm2@tiny") == "smollm2@tiny"
    assert naming.has_adapter("smollm2+pirate", {"smollm2"})
    # A file whose own name has a plus is a model, unless there is one without it.
    assert not naming.has_adapter("qwen+code", {"llama"})


def test_the_fingerprint_has_the_digest_of_the_adapter_and_says_so() -> None:
    one, two = (naming.adapter_fingerprint(BASE, digit * 64) for digit in "12")
    assert len({BASE, one, two}) == 3
    assert naming.what_differs([one, two]) == ["adapter 11111111", "adapter 22222222"]
    assert naming.how_to_match([one, two]) == "the same adapter file"
    assert naming.what_it_is(one) == "ctx 4096, kv_type f16, adapter 11111111"
    # Of a fingerprint that is as long as it may be, the digest stays
    long = "x" * limits.NAME_CHARS
    assert naming.adapter_fingerprint(long, "1" * 64) != naming.adapter_fingerprint(long, "2" * 64)
    assert len(naming.adapter_fingerprint(long, "1" * 64)) == limits.NAME_CHARS


def test_adapters_are_named_on_the_command_line() -> None:
    assert adapters.named("") == ()
    assert adapters.named("pirate=p.gguf, poet=/x/q=1.gguf") == (
        Adapter("pirate", "p.gguf"),
        Adapter("poet", "/x/q=1.gguf"),
    )
    assert adapters.named("folder/poet.gguf") == (Adapter("poet", "folder/poet.gguf"),)
    for wrong in ("a+b=x", "a@b=x", "=x", "a=", "a=x,a=y", ",".join(f"a{n}=x" for n in range(limits.ADAPTERS + 1))):
        with pytest.raises(BadAdapter):
            adapters.named(wrong)


def test_llambo_toml_gives_a_model_adapters(base: Path) -> None:
    path = str(lora.write(base.parent / "p.gguf", base, 1))
    aliases = {"tiny+pirate": path, "other+poet": path, "tiny": str(base)}
    assert adapters.of_model("tiny", (), aliases) == (Adapter("pirate", path),)
    # What the command line names goes first
    (own,) = adapters.of_model("tiny", [Adapter("pirate", str(base))], aliases)
    assert own.path == str(base)
    with pytest.raises(model_files.NoSuchModel, match="adapter missing"):
        adapters.of_model("tiny", [Adapter("x", "missing.gguf")], {})
    with pytest.raises(BadAdapter, match="longer than"):
        adapters.of_model("t" * 100, [Adapter("x" * 60, path)], {})


# --- files ---


def _wrong(file: File, key: str, kind: int, value: object) -> None:
    entry = file.entry(key)
    entry.kind, entry.value = kind, value


def test_an_adapter_fits_the_model_that_it_was_made_for(base: Path) -> None:
    path = lora.write(base.parent / "p.gguf", base, 1)
    assert adapters.problem_of(str(path), str(base)) == ""
    assert model_files.adapter_bytes(LlamaOptions(adapters=(Adapter("p", str(path)),))) == path.stat().st_size


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("architecture", "for models of the architecture qwen2"),
        ("type", "no adapter"),
        ("kind", "type 'dora'"),
        ("alpha as text", "adapter.lora.alpha has a value of another type"),
        ("activated", "activated LoRA"),
        ("half a pair", "one of both matrices"),
        ("unknown tensor", "which the model does not have"),
        ("other size", "it is for another model"),
        ("whole numbers", "no matrix of numbers"),
        ("three dimensions", "no matrix of numbers"),
        ("something else", "no tensor of a LoRA"),
        ("nothing", "has no tensors"),
        ("cut off", "is cut off"),
        ("no gguf", "not a GGUF file"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(base: Path, what: str, says: str) -> None:
    file = lora.file_for(base, 1)
    first = file.tensors[0]
    match what:
        case "architecture":
            _wrong(file, "general.architecture", STRING, b"qwen2")
        case "type":
            _wrong(file, "general.type", STRING, b"model")
        case "kind":
            _wrong(file, "adapter.type", STRING, b"dora")
        case "alpha as text":
            _wrong(file, "adapter.lora.alpha", STRING, b"4")
        case "activated":
            file.entries.append(Entry(b"adapter.alora.invocation_tokens", U32, [1, 2]))
        case "half a pair":
            del file.tensors[0]
        case "unknown tensor":
            for tensor in file.tensors[:2]:
                tensor.name = tensor.name.replace(b"blk.0", b"blk.99")
        case "other size":
            first.dims = [first.dims[0] // 2, first.dims[1]]
        case "whole numbers":
            first.kind = 26
        case "three dimensions":
            first.dims = [*first.dims, 1]
        case "something else":
            first.name = b"blk.0.attn_q.weight"
        case "nothing":
            file.tensors.clear()
    data = file.encode()
    data = data[:-64] if what == "cut off" else b"GGML" + data[4:] if what == "no gguf" else data
    path = base.parent / "wrong.gguf"
    path.write_bytes(data)
    assert says in adapters.problem_of(str(path), str(base))


def test_in_a_folder_an_adapter_belongs_to_what_it_fits_or_to_the_one_it_names(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = base.parent
    (folder / "copy.gguf").write_bytes(base.read_bytes())
    vectors = folder / "vectors.gguf"
    vectors.write_bytes(bert.file_of(bert.random_weights(1), bert.TINY, pooling=1))
    files = {
        "anyone": lora.write(folder / "anyone.gguf", base, 1),
        "named": lora.write(folder / "named.gguf", base, 1, {"general.base_model.0.name": "Org/copy"}),
        "other": lora.write(folder / "other.gguf", base, 1, {"general.base_model.0.name": "unknown"}),
        "a b": lora.write(folder / "a b.gguf", base, 1),
    }
    models = {name: str(folder / f"{name}.gguf") for name in ("tiny", "copy", "vectors")}
    given = {"tiny+mine": str(files["named"]), "vectors+x": str(files["named"]), "tiny+lost": "lost.gguf"}
    matches = adapters.Matches(given)
    for _ in range(2):
        found = matches.find(models, {name: str(path) for name, path in files.items()})
        names = {model: [each.name for each in its] for model, its in found.items()}
        assert names == {"tiny": ["anyone", "mine", "other"], "copy": ["anyone", "named", "other"], "vectors": []}
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == len(set(warned)) == 4
    for words in ("'tiny+a b' is not a name", "vectors+x is not served: the model does not generate", "lost.gguf"):
        assert any(words in text for text in warned), warned
    # Alone with a model that it does not fit, it says why
    matches.find({"vectors": models["vectors"]}, {"anyone": str(files["anyone"])})
    assert "anyone.gguf is not served: the model does not generate text" in caplog.messages[-1]
    # And no more than a worker can have
    many = {f"a{number:02}": str(files["anyone"]) for number in range(limits.ADAPTERS + 1)}
    assert len(adapters.Matches({}).find({"tiny": models["tiny"]}, many)["tiny"]) == limits.ADAPTERS
    assert "at most" in caplog.messages[-1]


# --- a worker and its fake engine ---

PIRATE = FakeOptions(adapters=(Adapter("pirate", "v1"), Adapter("poet", "v1")))


def test_a_worker_announces_each_adapter_as_a_model_while_it_loads_and_later() -> None:
    config = WorkerConfig(name="w", model="fake", fake=PIRATE, node_class="tiny")
    engine = EngineLife(config, [])
    announcement = Announcement(config, ProcessIdentity(b"i"), engine)
    names = {f"{name}{node_class}" for name in ("fake", "fake+pirate", "fake+poet") for node_class in ("", "@tiny")}
    assert {model.name for model in announcement.serving().models} == names
    engine.ready = FakeEngine(PIRATE).ready()
    models = {model.name: model.fingerprint for model in announcement.serving().models}
    assert models.keys() == names
    assert models["fake+pirate"] == models["fake+pirate@tiny"] != models["fake"]


def _words(engine: FakeEngine, model: str) -> list[int]:
    assert engine.start(Start(bytes(24), b"Hello", 8, 7, model=model), 0) is None
    found: list[Output] = []
    while not found or found[-1].end is None:
        found += engine.step(0)
    return [token for output in found for token in output.ids]


def test_a_fake_adapter_says_something_else_and_an_unknown_one_nothing() -> None:
    engine = FakeEngine(PIRATE)
    said = [_words(engine, model) for model in ("fake", "fake+pirate", "fake@tiny", "fake+pirate@tiny")]
    assert said[0] == said[2] != said[1] == said[3]
    # Another file under the same name says something else, and has another fingerprint
    other = FakeEngine(FakeOptions(adapters=(Adapter("pirate", "v2"),)))
    assert _words(other, "fake+pirate") != said[1]
    assert other.ready().models[1].fingerprint != engine.ready().models[1].fingerprint
    refused = engine.start(Start(bytes(24), b"Hello", 8, 7, model="fake+priest"), 0)
    assert refused is not None and not refused.final
    assert "pirate, poet" in refused.error.text


# --- the broker ---

V1, V2 = "1" * 64, "2" * 64


def problem(client: Client) -> ErrorInfo:
    assert client.problems, "it was not refused"
    return client.problems[-1].error


def models_of(worker: Worker) -> list[str]:
    return [given.model for given in worker.dispatches]


def test_a_request_with_an_adapter_goes_to_a_worker_that_has_it() -> None:
    bench = Bench()
    plain, pirate = (
        bench.worker("a", model="s", fingerprint=BASE),
        bench.worker("b", model="s", fingerprint=BASE, adapters={"pirate": V1}),
    )
    client = bench.client()
    for number, model in enumerate(("s+pirate", "+pirate")):
        client.submit(number, model=model)
    assert (models_of(plain), models_of(pirate)) == ([], ["s+pirate"] * 2)
    # Without a name the model alone is meant, which both have
    client.submit(7)
    assert models_of(plain) + models_of(pirate)[2:] == ["s"]


def test_an_unknown_adapter_is_refused_with_the_list() -> None:
    bench = Bench()
    bench.worker("a", model="s", fingerprint=BASE, adapters={"pirate": V1, "poet": V1})
    bench.worker("b", model="t", fingerprint=BASE)
    client = bench.client()
    for model, says in (
        ("s+priest", "no worker serves 's+priest'; with adapters of s there is: s+pirate, s+poet"),
        ("t+pirate", "with adapters of t there is: none"),
        ("+priest", "no model has an adapter 'priest'; with adapters there is: s+pirate, s+poet"),
        ("u+pirate", "no worker serves 'u+pirate'; there is: s, s+pirate, s+poet, t"),
    ):
        client.submit(hash(model) % 200, model=model)
        error = problem(client)
        assert (error.code, says in error.text) == (Code.UNKNOWN_MODEL, True), error.text
    # Which of several models is meant has to be said
    bench.worker("c", model="t", fingerprint=BASE, adapters={"poet": V2})
    client.submit(201, model="+poet")
    assert problem(client).text.endswith("name one of: s+poet, t+poet")


@pytest.mark.parametrize(("other", "continues"), [({"pirate": V1}, True), ({"pirate": V2}, False), ({}, False)])
def test_an_answer_goes_on_only_with_the_same_adapter(other: dict[str, str], continues: bool) -> None:
    bench = Bench(hold_ms=2_000)
    first, client = bench.worker("a", model="s", fingerprint=BASE, adapters={"pirate": V1}), bench.client()
    client.submit(1, model="s+pirate")
    first.publish(first.chunk(0, 5, 6))
    second = bench.worker("b", model="s", fingerprint=BASE, adapters=other)
    first.send(m.Goodbye())
    assert [given.prefix for given in second.dispatches] == ([[5, 6]] if continues else [])
    # It waits for one that has the adapter, and then goes on
    third = bench.worker("c", model="s", fingerprint=BASE, adapters={"pirate": V1})
    assert [given.prefix for given in third.dispatches] == ([] if continues else [[5, 6]])


def test_a_difference_of_the_model_is_reported_once_and_not_for_each_adapter() -> None:
    bench = Bench()
    bench.worker("a", model="s", fingerprint=BASE, adapters={"pirate": V1})
    bench.worker("b", model="s", fingerprint=BASE, adapters={"pirate": V2})
    bench.worker("c", model="s", fingerprint=BASE.replace("4096", "2048"), adapters={"pirate": V1})
    texts = [entry.text for entry in bench.state.journal.entries if entry.kind == "worker differs"]
    assert [text.partition(":")[0] for text in texts] == [
        "worker b serves s+pirate with adapter 22222222, a with adapter 11111111",
        "worker c serves s with ctx 2048, a with ctx 4096",
    ]


def test_a_key_for_the_model_is_not_one_for_its_adapters() -> None:
    bench = Bench()
    bench.keys(Identity("ann", "client", models=("s", "s+pi*")), Identity("box", "worker"))
    worker = bench.worker("box", model="s", fingerprint=BASE, adapters={"pirate": V1, "poet": V1}, user="box")
    client = bench.client(user="ann")
    client.submit(1, model="s+pirate")
    client.submit(2, model="s+poet")
    client.submit(3)
    assert models_of(worker) == ["s+pirate", "s"]
    error = problem(client)
    assert (error.code, "s+poet" in error.text.partition(";")[2]) == (Code.FORBIDDEN, False)


# --- callers ---


def test_the_client_has_an_option_for_it() -> None:
    def model(**options: Any) -> str:
        return build_request(b"\1" * 16, 1, "Hi", False, options)[0].model  # type: ignore[arg-type]

    assert model(model="s", lora="pirate") == "s+pirate"
    assert model(model="s@tiny", lora="pirate") == "s+pirate@tiny"
    assert (model(lora="pirate"), model(model="s", lora=None)) == ("+pirate", "s")
    for wrong in ("a+b", "", 7):
        with pytest.raises(LlamboError, match="not the name of an adapter"):
            model(lora=wrong)


@pytest.mark.parametrize("api", ["chat", "completions", "messages", "responses"])
def test_every_api_has_a_field_for_it(api: str) -> None:
    common: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
    body = {"completions": {"prompt": "Hi"}, "responses": {"input": "Hi"}}.get(api, common)

    def model(**more: Any) -> Any:
        return parsed(api, {**body, **more}).submission.options["model"]

    assert model() == "tiny"
    assert model(lora="pirate") == model(lora=[{"id": "pirate", "scale": 1}]) == "tiny+pirate"
    assert model(lora=[{"id": "poet", "scale": 0.0}, {"id": "pirate"}]) == "tiny+pirate"
    assert model(lora=[]) == model(lora=[{"id": 0, "scale": 0.0}]) == "tiny"
    for wrong, says in (
        ([{"id": "a"}, {"id": "b"}], "several adapters"),
        ([{"id": 0}], "adapters have names here"),
        ([{"id": "a", "scale": 0.5}], "has the scale 1"),
        ("a+b", "not the name of an adapter"),
    ):
        with pytest.raises(FieldError, match=says):
            model(lora=wrong)
