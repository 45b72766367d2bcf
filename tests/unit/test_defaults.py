"""Sampling defaults: the request's values, then the model's, then llambo's."""

from __future__ import annotations

from pathlib import Path

from llambo.mesh.wire.messages import Sampling
from llambo.worker.llama import sampling
from llambo.worker.models import gguf
from tests.unit.test_models import tiny

MORE: dict[str, float | str] = {
    "general.sampling.temp": 0.6,
    "general.sampling.top_k": 20,
    "general.sampling.top_p": 0.95,
    "general.sampling.penalty_repeat": 1.05,
    "general.sampling.penalty_last_n": 128.0,
}


def test_they_are_read_from_the_file(tmp_path: Path) -> None:
    file = gguf.read(str(tiny(tmp_path / "x.gguf", more=MORE)))
    found, complaints = sampling.recommended(file.meta)
    assert found == {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "penalty_last_n": 128, "repeat_penalty": 1.05}
    assert complaints == []


def test_every_key_has_an_option_of_that_name() -> None:
    assert set(sampling.KEYS.values()) <= set(Sampling.__struct_fields__)


def test_what_a_request_says_wins_also_where_it_says_our_default() -> None:
    model: sampling.Defaults = {"temperature": 0.6, "top_k": 20, "min_p": 0.0}
    asked = Sampling(temperature=0.8, stop=["x"])
    found = sampling.with_defaults(asked, ["temperature", "stop"], model)
    assert (found.temperature, found.top_k, found.min_p, found.stop) == (0.8, 20, 0.0, ["x"])
    assert found.top_p == Sampling().top_p
    assert sampling.with_defaults(asked, [], {}) is asked


def test_what_makes_no_sense_is_left_out_and_reported(tmp_path: Path) -> None:
    more: dict[str, float | str] = {
        "general.sampling.temp": -1.0,
        "general.sampling.mirostat": 1,
        "general.sampling.top_p": "high",
        "general.sampling.top_k": 2.5,
        "general.sampling.min_p": 0.25,
    }
    found, complaints = sampling.recommended(gguf.read(str(tiny(tmp_path / "x.gguf", more=more))).meta)
    assert found == {"min_p": 0.25}
    assert sorted(complaint.split()[0] for complaint in complaints) == sorted(more.keys() - {"general.sampling.min_p"})


def test_the_defaults_in_force_are_reported_at_the_start() -> None:
    text = sampling.describe({"temperature": 0.6, "repeat_penalty": 1.05})
    assert (
        "temperature 0.6 (from the model), top-k 40, top-p 0.95, min-p 0.05, repeat-penalty 1.05 (from the model)"
        in text
    )
