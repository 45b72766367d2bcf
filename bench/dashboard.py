"""How soon what happens is on the dashboard: a worker is killed, and an open browser notes when it shows that.

Broker, workers and gateway as commands, Chromium without a window; both clocks are the same machine's. Also the
cost of looking: processor time of broker and gateway without a viewer and with one.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from typing import Any

from playwright.sync_api import sync_playwright

from bench.figures import quantile
from bench.processes import Node
from llambo.testing.processes import cpu_s

#: How long the cost of looking is measured.
COST_S = 10.0
#: The page notes when a worker's row shows a word.
NOTE = """([name, word]) => { window.noted = 0; window.noting?.disconnect(); const look = () => {
    const row = [...document.querySelectorAll("#workers-table tbody tr")]
        .find(each => each.querySelector(".title").textContent === name);
    if (row?.querySelector(".state .word").textContent === word) window.noted ||= Date.now(); };
    window.noting = new MutationObserver(look);
    window.noting.observe(document.body, {subtree: true, childList: true, characterData: true});
    look(); }"""


def death_ms(page: Any, worker: dict[str, Any]) -> float:
    """From the kill to the moment at which the page shows the worker as lost."""
    with Node("worker", {**worker, "name": "victim"}) as victim:
        page.evaluate(NOTE, ["victim", "ready"])
        page.wait_for_function("() => window.noted")
        page.evaluate(NOTE, ["victim", "lost"])
        time.sleep(random.random())  # or each would come at the same moment of a round of queries
        killed_at = time.time()
        os.kill(victim.pid, signal.SIGKILL)
        page.wait_for_function("() => window.noted")
        return float(page.evaluate("window.noted")) - killed_at * 1_000


def cost(pids: dict[str, int], seconds: float) -> dict[str, float]:
    """Share of a core that each takes, in percent."""
    before = {name: cpu_s(pid) for name, pid in pids.items()}
    time.sleep(seconds)
    return {name: round(100 * (cpu_s(pid) - before[name]) / seconds, 1) for name, pid in pids.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deaths", type=int, default=20)
    parser.add_argument("--workers", type=int, default=5, help="that stay")
    parser.add_argument("--browser", default=shutil.which("chromium"))
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        broker = stack.enter_context(Node("broker"))
        worker = {"broker": broker.address}
        for number in range(options.workers):
            stack.enter_context(Node("worker", {**worker, "name": f"w{number}"}))
        gateway = stack.enter_context(Node("gateway", worker))
        pids = {"broker": broker.pid, "gateway": gateway.pid}
        unseen = cost(pids, COST_S)
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=options.browser, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{gateway.port}/")
        page.wait_for_selector("#workers-table tbody tr")
        seen = cost(pids, COST_S)
        times = [death_ms(page, worker) for _ in range(options.deaths)]
        browser.close()
    costs = ", ".join(f"{name} {seen[name]} % of a core ({unseen[name]} % unseen)" for name in pids)
    print(f"dashboard, {options.workers} workers")
    print(f"a death is shown after: median {quantile(times, 0.5):.0f} ms, longest {max(times):.0f} ms of {len(times)}")
    print(f"looking costs: {costs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
