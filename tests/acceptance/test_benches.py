"""The benchmarks run, from one end to the other. What they measure is no matter of a test: see docs/benchmarks.md."""

from __future__ import annotations

import pytest

from bench.__main__ import NAMES, WITH_MODEL, main

#: `kills` has a test of its own.
SHORT = {
    "requests": ["--rounds", "1", "--seconds", "0.2"],
    "latency": ["--rounds", "1", "--requests", "10"],
    "tokens": ["--rounds", "1", "--streams", "20", "--length", "50"],
    "keys": ["--rounds", "1", "--seconds", "0.2", "--length", "20", "--requests", "10"],
    "thousand": ["--workers", "10", "--seconds", "1", "--rate", "20", "--streams", "10", "--kills", "1"],
    "overload": ["--seconds", "1", "--peak-seconds", "1"],
    "engine": ["--threads", "1", "--tokens", "8", "--streams", "1", "3"],
    "hops": ["--threads", "1", "--requests", "3", "--warm", "1"],
    "newcomer": ["--threads", "1", "--rounds", "1", "--tokens", "100", "--before", "12", "--alone"],
    "turns": ["--threads", "1", "--chats", "1", "--prompt-tokens", "60", "--tokens", "4"],
    "gateway": ["--threads", "1", "--rounds", "1", "--tokens", "4", "--streams", "1", "--open", "20", "--alone"],
    "beside": ["--threads", "1", "--rounds", "1", "--tokens", "4", "--streams", "1", "--beside", "--profile"],
}


@pytest.mark.parametrize("name", SHORT)
def test_a_benchmark_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([name, *SHORT[name]])
    assert capsys.readouterr().out.startswith(name)


def test_an_unknown_benchmark_is_answered_with_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["faster"]) == 2
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES + WITH_MODEL)
