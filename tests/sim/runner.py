"""Runs seeds and adds up what they report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tests.sim.on_demand import DemandWorld
from tests.sim.world import Report, World


def run_seed(item: tuple[int, ...], *, hosts: bool = False) -> Report:
    """Seed, how often to check the invariants, and how many brokers (0: as the seed says)."""
    return (DemandWorld if hosts else World)(*item).run()


@dataclass
class Tally:
    runs: int = 0
    tokens: int = 0
    requests: int = 0
    dispatches: int = 0
    moves: int = 0
    adopted: int = 0
    duplicates: int = 0
    stale: int = 0
    repaired: int = 0
    poisoned: int = 0
    loads: int = 0
    unloads: int = 0
    refused: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    bad: list[Report] = field(default_factory=list)

    def add(self, report: Report) -> None:
        self.runs += 1
        counts = (
            "tokens",
            "requests",
            "dispatches",
            "moves",
            "adopted",
            "duplicates",
            "stale",
            "repaired",
            "poisoned",
            "loads",
            "unloads",
            "refused",
        )
        for name in counts:
            setattr(self, name, getattr(self, name) + getattr(report, name))
        if report.wrong:
            self.bad.append(report)
            self.kinds.update(problem.split(":")[0] for problem in report.wrong)

    @property
    def duplicates_per_token(self) -> float:
        return self.duplicates / max(1, self.tokens)

    def summary(self, seconds: float) -> str:
        found = ("lost", "duplicated", "wrong", "stuck", "failed", "poison", "disturbed", "broken")
        return (
            f"{self.runs} runs, {self.requests} requests, {self.tokens} tokens in {seconds:.1f} s\n"
            f"{self.dispatches} dispatches, {self.moves} moved ({100 * self.moves / max(1, self.dispatches):.1f} %), "
            f"{self.adopted} adopted, {self.poisoned} ended as poison, "
            f"{self.stale} stale chunks refused, {self.repaired} repairs, "
            f"{self.duplicates_per_token:.3f} duplicate frames per token\n"
            f"{self.loads} models loaded, {self.unloads} unloaded, {self.refused} ended without their model\n"
            + ", ".join(f"{self.kinds[kind]} {kind}" for kind in found)
            + f"\n{self.runs - len(self.bad)} passed, {len(self.bad)} failed"
        )
