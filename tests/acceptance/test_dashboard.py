"""The dashboard in a browser: live, on any screen, by keyboard, and deaf to what is smuggled in."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llambo import SyncClient
from llambo.mesh.security import api_tokens
from llambo.mesh.security.keyring import Folder
from llambo.testing.mesh import Mesh, key_folder
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import FakeOptions, WorkerConfig
from tests.acceptance import browser
from tests.acceptance.browser import PHONE, Look
from tests.integration.gateway_process import GatewayProcess

pytestmark = pytest.mark.needs("chromium", "libatomic")

SMUGGLED = "<img src=x onerror=alert(1)>"
FAKE = FakeOptions(slots=4, tokens_per_s=60)
#: How a worker's row says its state, by the worker's name.
STATE = """name => [...document.querySelectorAll("#workers-table tbody tr")]
    .find(row => row.querySelector(".title").textContent === name)?.querySelector(".state .word").textContent"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.browsing() as found:
        yield found


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Mesh(workers=3, fake=FAKE, worker=WorkerConfig(node_class="tiny")) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def gateway(mesh: Mesh) -> Iterator[GatewayProcess]:
    with GatewayProcess(mesh.address, "--resume-ms", "100") as gateway:
        yield gateway


@pytest.fixture
def look(chromium: Any, gateway: GatewayProcess) -> Iterator[Look]:
    with looking(chromium, gateway) as look:
        yield look


@contextmanager
def looking(chromium: Any, gateway: GatewayProcess, *, board: bool = True, **options: Any) -> Iterator[Look]:
    """A browser with the board open. At the end the test fails if the page has logged an error."""
    look = Look(chromium, gateway.url, **options)
    try:
        if board:
            look.page.wait_for_selector("#workers-table tbody tr")
        yield look
        look.check()
    finally:
        look.close()


@contextmanager
def busy(mesh: Mesh, **options: Any) -> Iterator[None]:
    """Meanwhile a client asks for an answer that takes long, and reads it."""
    over = threading.Event()

    async def ask() -> None:
        async with mesh.client(name=SMUGGLED) as client:
            stream = client.stream("a long story", max_tokens=4_000, **options)
            await stream.next_piece()
            begun.set()
            await asyncio.to_thread(over.wait)
            await stream.aclose()

    begun = threading.Event()
    asking = threading.Thread(target=lambda: asyncio.run(ask()))
    asking.start()
    try:
        assert begun.wait(TIMEOUT_S), "the answer did not begin"
        yield
    finally:
        over.set()
        asking.join(TIMEOUT_S)


def state_is(look: Look, worker: str, state: str) -> None:
    look.until(f"([name, state]) => ({STATE})(name) === state", [worker, state])


# --- how it looks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"color_scheme": "light"}, {"color_scheme": "dark"}, PHONE], ids=["light", "dark", "phone"]
)
def test_everybody_can_use_it(mesh: Mesh, chromium: Any, gateway: GatewayProcess, options: dict[str, Any]) -> None:
    with busy(mesh), looking(chromium, gateway, reduced_motion="reduce", **options) as look:
        look.page.wait_for_selector("#requests-table tbody tr")
        assert look.page.locator("h1:visible").inner_text() == "All 3 workers are ready"
        assert look.page.locator("#places .title").all_inner_texts()[0] == "tiny"
        assert look.ask("document.documentElement.scrollWidth <= innerWidth"), "it is wider than the screen"
        assert look.ask("getComputedStyle(document.querySelector('.link .shape')).animationName") == "none"
        assert look.violations() == []
        look.page.locator("#requests-table tbody button").first.click()
        look.page.locator("#story-list li").first.wait_for()
        assert look.violations() == []
        look.page.keyboard.press("Escape")
        look.page.locator(".act button:visible").first.click()
        look.page.locator("#confirm[open]").wait_for()
        assert look.violations() == []


def test_those_that_wait_are_listed_and_all_of_them_on_demand(mesh: Mesh, look: Look) -> None:
    with SyncClient(mesh.address) as client:
        ids = [client.submit("a long story", max_tokens=4_000, detached=True) for _ in range(20)]
        try:
            look.page.locator("#requests-table tr", has_text="next in line").wait_for()
            look.page.locator("#requests-table .more").click()
            look.until("count => document.querySelectorAll('#requests-table tr[data-over=false]').length === count", 20)
            assert look.page.locator("#requests-table tr", has_text="before it").count() == 7
        finally:
            for id in ids:
                client.cancel(id)


def test_the_theme_can_be_chosen_and_is_kept(look: Look) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    shown = [look.ask(paper)]
    for _ in range(2):
        look.page.click("#theme")
        shown.append(look.ask(paper))
    assert look.page.inner_text("#theme") == "Theme: dark"
    assert shown[0] == shown[1] != shown[2]
    look.page.reload()
    assert look.ask(paper) == shown[2]


# --- live ----------------------------------------------------------------------------------------------------


def test_a_death_and_a_recovery_are_on_the_page(mesh: Mesh, look: Look) -> None:
    """How soon is measured by bench/dashboard.py; here it has to happen at all."""
    victim = mesh.spawn("victim")
    victim.first_line()
    state_is(look, "victim", "ready")
    victim.send(signal.SIGKILL)
    state_is(look, "victim", "lost")
    look.page.locator("#activity li", has_text="victim was lost").wait_for()
    mesh.workers.remove(victim)
    victim.close()
    again = mesh.spawn("victim")
    state_is(look, "victim", "ready")
    look.page.locator("#activity li", has_text="victim recovered").first.wait_for()
    again.send(signal.SIGTERM)
    look.page.locator("#activity li", has_text="victim left").wait_for()


def test_a_broker_that_is_gone_and_its_successor_are_shown(chromium: Any) -> None:
    with (
        Mesh(workers=1, fake=FAKE, broker="process") as mesh,
        GatewayProcess(mesh.address) as gateway,
        looking(chromium, gateway) as look,
    ):
        assert mesh.process is not None
        mesh.process.send(signal.SIGSTOP)
        look.until("() => document.querySelector('#link').dataset.state === 'lost'")
        assert look.page.inner_text("h1:visible") == "The mesh does not answer"
        mesh.restart_broker(signal.SIGKILL)
        look.until("() => document.querySelector('#link').dataset.state === 'live'")
        state_is(look, "w0", "ready")


# --- doing ---------------------------------------------------------------------------------------------------


def test_the_playground_streams_by_keyboard(look: Look) -> None:
    look.page.fill("#max-tokens", "90")
    look.page.focus("#prompt")
    look.ask("""() => { window.lengths = new Set();
        new MutationObserver(() => window.lengths.add(document.querySelector("#answer").textContent.length))
            .observe(document.querySelector("#answer"), {childList: true, characterData: true}); }""")
    look.page.keyboard.press("Control+Enter")
    look.page.locator("#answer[data-state=done]").wait_for()
    assert look.ask("window.lengths.size") > 20, "it came all at once"
    facts = look.page.inner_text("#answer-facts")
    assert facts.startswith("90 tokens in ") and facts.endswith("stopped at its limit")
    look.page.click("#answer-story")
    steps = look.page.locator("#story-list b")
    steps.last.wait_for()
    assert [steps.first.inner_text(), steps.last.inner_text()] == ["submitted", "ended"]


def test_the_playground_stops_on_its_button(mesh: Mesh, look: Look) -> None:
    look.page.fill("#max-tokens", "4000")
    look.page.click("#ask-send")
    look.until("() => document.querySelector('#answer').textContent.length > 20")
    look.page.click("#ask-stop")
    look.page.locator("#answer-facts", has_text="Stopped after").wait_for()
    mesh.until(lambda core: not core.state.running, "the answer was cancelled")


def test_a_refusal_is_shown(look: Look) -> None:
    look.allowed = ("status of 400",)
    look.page.fill("#prompt", "x")
    look.ask("document.querySelector('#temperature').value = -5")
    look.ask("document.querySelector('#ask').noValidate = true")
    look.page.click("#ask-send")
    look.page.locator("#answer-facts", has_text="temperature").wait_for()


def test_a_worker_is_drained_and_given_work_again_by_keyboard(look: Look) -> None:
    button = look.page.get_by_role("button", name="Drain w1")
    button.focus()
    look.page.keyboard.press("Enter")
    assert look.page.inner_text("#confirm-title") == "Drain w1?"
    look.page.keyboard.press("Escape")
    assert look.ask("document.activeElement.textContent") == "Drain w1", "the focus is lost"
    look.page.keyboard.press("Enter")
    look.page.get_by_role("button", name="Drain", exact=True).press("Enter")
    state_is(look, "w1", "drained")
    look.page.get_by_role("button", name="Undrain w1").press("Enter")
    look.page.get_by_role("button", name="Undrain", exact=True).press("Enter")
    state_is(look, "w1", "ready")


def test_models_on_demand_are_loaded_and_unloaded(chromium: Any) -> None:
    def says(look: Look, text: str) -> None:
        look.until("text => document.querySelector('#models').innerText.includes(text)", text)

    with Mesh(workers=0) as mesh:
        mesh.spawn_host("box", "a:40:300ms,big:400", "--memory-bytes", "100MiB", "--min-loaded-ms", "0").line(
            "is ready"
        )
        with GatewayProcess(mesh.address) as gateway:
            look = Look(chromium, gateway.url, reduced_motion="reduce", **PHONE)
            try:
                says(look, "the budget is 100 MiB")
                assert look.page.locator("h1:visible").inner_text() == "No model is loaded"
                look.page.locator("#models-table tbody button").first.click()
                look.page.locator("#confirm-check").check()
                assert look.violations() == []
                look.page.locator("#confirm-yes").click()
                says(look, "pinned, anyone")
                says(look, "box: 40 MiB of 100 MiB")
                assert look.ask("document.documentElement.scrollWidth <= innerWidth"), "it is wider than the screen"
                assert look.violations() == []
                look.page.get_by_role("button", name="Unload a").click()
                look.page.locator("#confirm-yes").click()
                says(look, "box: 0 B of 100 MiB")
                look.check()
            finally:
                look.close()


def test_a_request_is_cancelled_from_its_story(mesh: Mesh, look: Look) -> None:
    with busy(mesh):
        look.page.locator("#requests-table tr[data-over=false] button").first.click()
        look.page.locator("#story-list b", has_text="accepted").wait_for()
        look.page.click("#story-cancel")
        look.page.click("#confirm-yes")
        look.page.locator("#story-facts", has_text="ended: cancelled").wait_for()
        mesh.until(lambda core: not core.state.running, "the request was cancelled")


def test_workers_are_found_by_what_is_known_of_them(look: Look) -> None:
    look.page.fill("#workers-filter", "w2")
    assert look.page.locator("#workers-table .title").all_inner_texts() == ["w2"]
    look.page.fill("#workers-filter", "no-such")
    look.page.get_by_text("No worker has “no-such”").wait_for()
    look.page.fill("#workers-filter", "TINY")
    assert look.page.locator("#workers-table tbody tr").count() == 3


# --- permissions, and content that must not run --------------------------------------------------------------


def test_what_the_mesh_says_is_text(chromium: Any) -> None:
    """From an empty mesh, which says what to do, to one with names that no page should trust."""
    hostile = WorkerConfig(node_class=SMUGGLED, model=SMUGGLED)
    with (
        Mesh(workers=0, fake=FAKE, worker=hostile) as mesh,
        GatewayProcess(mesh.address) as gateway,
        looking(chromium, gateway, board=False) as look,
    ):
        look.page.get_by_text("Start one on any machine").wait_for()
        assert look.page.locator("h1:visible").inner_text() == "No worker has joined yet"
        assert look.violations() == []
        for name in (SMUGGLED, "__proto__"):
            mesh.spawn(name)
        state_is(look, SMUGGLED, "ready")
        state_is(look, "__proto__", "ready")
        with busy(mesh, model=SMUGGLED):
            told_as_text(look)
        look.page.fill("#prompt", SMUGGLED)
        look.page.fill("#max-tokens", "5")
        look.page.click("#ask-send")
        look.page.locator("#answer[data-state=done]").wait_for()
        assert look.ask("document.querySelectorAll('img, iframe, object, body script').length") == 0
        assert look.ask("Object.keys(Object.prototype).length") == 0


def told_as_text(look: Look) -> None:
    page = look.page
    page.locator("#requests-table tr[data-over=false] .sub", has_text=SMUGGLED).first.wait_for()
    assert SMUGGLED in page.locator("#places .title").all_inner_texts()
    # Also by its class.
    assert page.locator("#model option").all_inner_texts() == [SMUGGLED, f"{SMUGGLED}@{SMUGGLED}"]
    assert page.locator("#workers-table .title + .sub").first.inner_text().count(SMUGGLED) == 2
    page.locator("#activity li", has_text=SMUGGLED).first.wait_for()
    page.locator("#requests-table tbody button").first.click()
    page.locator("#story-facts dd", has_text=SMUGGLED).first.wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("button", name=f"Drain {SMUGGLED}").click()
    assert page.inner_text("#confirm-title") == f"Drain {SMUGGLED}?"
    page.keyboard.press("Escape")


def test_even_a_hole_in_the_page_would_let_nothing_in(look: Look) -> None:
    """The policy of the page: nothing from elsewhere, nothing inline, and no text that becomes markup."""
    look.allowed = ("Content Security Policy", "requires 'TrustedHTML'")
    with pytest.raises(Exception, match="TrustedHTML"):
        look.ask("document.body.innerHTML = '<b>x</b>'")
    broken = look.ask("""() => new Promise(done => {
        const seen = new Set();
        document.addEventListener("securitypolicyviolation", event => {
            seen.add(event.effectiveDirective);
            if (seen.size === 3) done([...seen].sort());
        });
        document.body.append(Object.assign(document.createElement("style"), {textContent: "h1 {display: none}"}));
        document.body.append(Object.assign(document.createElement("img"), {src: "https://elsewhere.invalid/"}));
        fetch("https://elsewhere.invalid/").catch(() => {});
    })""")
    assert broken == ["connect-src", "img-src", "style-src-elem"]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return key_folder(tmp_path / "keys", boss="admin", viewer="client", gateway="client")


def test_with_keys_it_is_for_admins(chromium: Any, folder: Folder) -> None:
    with (
        Mesh(workers=1, fake=FAKE, keys=folder) as mesh,
        GatewayProcess(mesh.address, "--http-keys", str(folder.path)) as gateway,
        looking(chromium, gateway, board=False) as look,
    ):
        look.allowed = ("status of 401", "status of 403")
        signing_in(look, folder)


def signing_in(look: Look, folder: Folder) -> None:
    page = look.page
    page.locator("#signin:visible").wait_for()
    assert look.ask("document.activeElement.id") == "token"
    assert look.violations() == []
    viewer, boss = (api_tokens.issue(folder, name, 0) for name in ("viewer", "boss"))
    for wrong, answer in (("sk-llambo-wrong", "no such API token"), (viewer, "admin")):
        page.fill("#token", wrong)
        page.keyboard.press("Enter")
        page.locator("#signin-problem", has_text=answer).wait_for()
        assert look.ask("sessionStorage.length") == 0
    page.fill("#token", boss)
    page.keyboard.press("Enter")
    state_is(look, "w0", "ready")
    page.reload()
    state_is(look, "w0", "ready")
    assert boss not in page.content() and boss not in page.url
    page.fill("#max-tokens", "5")
    page.click("#ask-send")
    page.locator("#answer[data-state=done]").wait_for()
    page.click("#signout")
    page.locator("#signin:visible").wait_for()
    assert look.ask("sessionStorage.length") == 0
    assert not page.locator("#board").is_visible()
    page.fill("#token", boss)
    page.keyboard.press("Enter")
    state_is(look, "w0", "ready")
    api_tokens.withdraw(folder, "boss")
    page.locator("#signin:visible").wait_for()
