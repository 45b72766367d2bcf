"""A real browser for tests of pages: Chromium without a window, and what it complains about."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tools import needs

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

#: No wait of a test takes longer, however busy the machine is.
TIMEOUT_MS = 30_000.0
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}


@contextmanager
def browsing() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    # As root there is no sandbox to be had, and the pages are our own.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=needs.browser(), args=arguments, timeout=TIMEOUT_MS)
        try:
            yield browser
        finally:
            browser.close()


class Look:
    """One visitor: a context of his own, a page, and all that the page has complained about."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.complaints: list[str] = []
        #: Complaints with this in them are what the test is about.
        self.allowed: tuple[str, ...] = ()
        self.context: BrowserContext = browser.new_context(**options)
        self.context.set_default_timeout(TIMEOUT_MS)
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda message: self._heard(message.type, message.text))
        self.page.on("pageerror", lambda error: self._heard("error", str(error)))
        self.page.on("dialog", self._dialog)
        self.page.goto(url)

    def _heard(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(text)

    def _dialog(self, dialog: Any) -> None:
        self.complaints.append(f"a dialog was opened: {dialog.message}")
        dialog.dismiss()

    def ask(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(script, argument)

    def until(self, script: str, argument: Any = None) -> None:
        """Wait until it is true in the page, which is asked at each of its frames."""
        self.page.wait_for_function(script, arg=argument)

    def violations(self) -> list[str]:
        """What axe-core finds wrong with what is shown now."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page).response["violations"]
        return [
            f"{each['id']} ({each['impact']}): {each['help']}\n    {node['html'][:200]}\n    {node['failureSummary']}"
            for each in found
            for node in each["nodes"][:3]
        ]

    def close(self) -> None:
        self.context.close()

    def check(self) -> None:
        """Nothing has gone wrong that only a developer would see."""
        rest = [text for text in self.complaints if not any(allowed in text for allowed in self.allowed)]
        assert not rest, f"the page complains: {rest}"
