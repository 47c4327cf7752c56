"""The page in a browser, over an engine that has answered prompts from host memory and from disk."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine import disk_tools, scenarios
from tests.engine.disk_tools import SMALL, settings
from tests.engine.harness import BLOCK_SIZE, Engine
from tests.engine.prompts import Prompts
from tests.engine.scenarios import Ask, Stepper
from tests.unit.http_tools import TOKEN, ask

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PHONE, DESKTOP = (360, 780), (1180, 1120)
BAD_NAME = "<img src=x onerror='document.title=1'>"


def port_of(llm: Any) -> int:
    return scenarios.side(llm).server.port


def turn_off(llm: Any, reason: str) -> None:
    scenarios.leader(llm).off_reason = reason


def ask_by_name(llm: Any, name: str, prompt: Ask) -> None:
    stepper = Stepper(llm)
    stepper.add(name, prompt)
    stepper.finish()
    scenarios.drain(llm)


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    more = {
        "DYN_KVBM_METRICS": "1",
        "DYN_KVBM_METRICS_PORT": "0",
        "KVBM_METRICS_HOST": "127.0.0.1",
        "KVBM_ADMIN_TOKEN": TOKEN,
    }
    env = settings(tmp_path_factory.mktemp("disk"), host=128, more=more)
    with Engine(model, kvbm={}, env=env, **SMALL) as engine:
        yield engine


@pytest.fixture(scope="module")
def port(engine: Engine, prompts: Prompts) -> int:
    """Of the engine's server, when prompts were answered from the device, from host memory and from disk."""
    asks = [Ask(prompts.make(seed, tokens)) for seed, tokens in ((1, 620), (2, 500), (3, 330), (4, 180))]
    engine.call(disk_tools.store, asks)
    longer = [Ask(each.prompt[:320] + prompts.make(9, 200)) for each in asks[:2]]
    engine.call(disk_tools.from_disk, asks[:3])
    engine.call(disk_tools.run_again, [*asks[1:], *longer])
    engine.call(disk_tools.run, asks[2:])
    return engine.call(port_of)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: apt-get install chromium-headless-shell (looked for {', '.join(BROWSERS)})")
    with sync_api.sync_playwright() as playwright:
        # Chromium's sandbox refuses root, which is whom CI runs as. The page is ours.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A page that is open. asked: what it has requested; complaints: what it wrote or raised."""

    def __init__(self, browser: Any, url: str, size: tuple[int, int], **options: Any) -> None:
        viewport = {"width": size[0], "height": size[1]}
        self.page = browser.new_page(viewport=viewport, **options)
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def wait(self, words: str) -> None:
        self.page.wait_for_function("words => document.body.innerText.includes(words)", arg=words)


@pytest.fixture
def tab(browser: Any, port: int) -> Iterator[Any]:
    tabs: list[Tab] = []

    def open_tab(size: tuple[int, int] = DESKTOP, host: str = "127.0.0.1", **options: Any) -> Tab:
        tabs.append(Tab(browser, f"http://{host}:{port}/", size, **options))
        return tabs[-1]

    yield open_tab
    for each in tabs:
        each.page.close()


def megabytes(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def test_the_log_tells_the_address(engine: Engine, port: int) -> None:
    assert f"KVBM: page, metrics and administration at http://127.0.0.1:{port}" in engine.log(1_000_000)


def test_the_run_was_one_with_hits_of_all_kinds(port: int) -> None:
    status, now = ask(port, "/api/status")
    assert status == 200
    assert now["ready"]
    assert now["hit_rates"]["host"] > 0
    assert now["hit_rates"]["disk"] > 0
    for kind in ("device", "host", "disk", "saved"):
        assert now["totals"][f"{kind}_tokens"] > 0, kind
    assert all(edge["bytes"] > 0 for edge in now["edges"])
    _, listed = ask(port, "/api/requests")
    for request in listed["requests"]:
        sources = [request[f"{kind}_tokens"] for kind in ("device", "host", "disk", "computed")]
        assert sum(sources) == request["prompt_tokens"]
        assert request["explanation"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_the_page_shows_the_numbers_of_the_run(
    tab: Any, port: int, size: tuple[int, int], scheme: str, tmp_path: Path
) -> None:
    opened = tab(size, color_scheme=scheme, device_scale_factor=1)
    opened.wait("live, ")
    _, now = ask(port, "/api/status")
    assert now["engine"] in opened.text("header")
    assert opened.page.is_hidden("#notice")
    tiers = opened.text("#tiers")
    for tier in now["tiers"]:
        assert f"{tier['registered']:,} of {tier['usable']:,} blocks" in tiers
        usable = tier["bytes"] * tier["usable"] / tier["blocks"]
        assert f"{megabytes(tier['used_bytes'])} of {megabytes(usable)}" in tiers
    rows = opened.page.locator("#edges tr").all_inner_texts()
    assert len(rows) == 1 + len(now["edges"])
    for row, edge in zip(rows[1:], now["edges"], strict=True):
        assert megabytes(edge["bytes"]) in row
    rates = opened.text("#rates")
    assert f"{100 * now['hit_rates']['host']:.1f} %\nhost hit rate" in rates
    assert f"{100 * now['hit_rates']['disk']:.1f} %\ndisk hit rate" in rates
    assert f"{now['totals']['saved_tokens']:,}\nprompt tokens not computed" in rates
    assert f"{now['totals']['saved_seconds']:.1f} s\nof prefill saved" in rates
    misses = opened.text("#misses")
    assert all(f"{reason}\t{count}" in misses for reason, count in now["misses"].items())
    # Nothing sticks out of the window.
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert opened.complaints == []
    assert all(url.startswith((f"http://127.0.0.1:{port}/", "data:")) for url in opened.asked)
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path)  # SCREENSHOTS=docs/images: those of the docs
    if scheme == "light":
        opened.page.wait_for_function("() => document.querySelector('#edges').innerText.includes('/s')")
        name = "page-phone.png" if size == PHONE else "page.png"
        opened.page.set_viewport_size({"width": size[0], "height": 1500 if size == PHONE else size[1]})
        opened.page.screenshot(path=folder / name)
        assert (folder / name).stat().st_size < 200_000


def test_a_request_is_explained_when_it_is_touched(tab: Any, port: int) -> None:
    opened = tab(PHONE, has_touch=True)
    opened.wait("live, ")
    _, listed = ask(port, "/api/requests?limit=30")
    cards = opened.page.locator("#requests details")
    assert cards.count() == min(30, len(listed["requests"]))
    chosen = next(i for i, request in enumerate(listed["requests"]) if request["disk_tokens"])
    request = listed["requests"][chosen]
    assert f"disk {request['disk_tokens']:,}" in cards.nth(chosen).inner_text()
    assert request["explanation"] not in cards.nth(chosen).inner_text()
    cards.nth(chosen).locator("summary").tap()
    assert request["explanation"] in cards.nth(chosen).inner_text()
    parts = cards.nth(chosen).locator(".bar i").evaluate_all("all => all.map(e => e.style.width)")
    shares = [request[f"{kind}_tokens"] for kind in ("device", "host", "disk", "computed")]
    assert [float(part.rstrip("%")) for part in parts] == pytest.approx(
        [100 * share / request["prompt_tokens"] for share in shares], abs=0.01
    )
    seen = opened.text("#live")
    opened.page.wait_for_function("seen => document.querySelector('#live').innerText !== seen", arg=seen)
    assert request["explanation"] in cards.nth(chosen).inner_text()  # it stays open


def test_what_flows_while_one_looks(tab: Any, engine: Engine, prompts: Prompts) -> None:
    opened = tab()
    opened.wait("live, ")
    assert "/s" not in opened.text("#edges")  # not before there is a difference
    answer = engine.begin(disk_tools.run_again, [Ask(prompts.make(1, 620)), Ask(prompts.make(6, 620))])
    cells = "[...document.querySelectorAll('#edges td:nth-child(3)')]"
    opened.page.wait_for_function(f"() => {cells}.some(cell => parseFloat(cell.innerText) > 0)")
    answer()


def test_what_users_call_their_requests_is_only_text(tab: Any, engine: Engine, prompts: Prompts) -> None:
    engine.call(ask_by_name, BAD_NAME, Ask(prompts.make(5, 4 * BLOCK_SIZE)))
    opened = tab()
    opened.wait(BAD_NAME)
    assert BAD_NAME in opened.text("#requests")
    assert opened.page.locator("img").count() == 0
    assert opened.page.title() == "KVBM"
    assert opened.complaints == []


def test_a_hidden_page_asks_for_nothing(tab: Any) -> None:
    opened = tab()
    opened.wait("live, ")
    hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
    tell = "document.dispatchEvent(new Event('visibilitychange'))"
    opened.page.evaluate(hide % "true" + tell)
    opened.page.wait_for_timeout(300)
    before = len(opened.asked)
    opened.page.wait_for_timeout(4500)
    assert len(opened.asked) == before
    opened.page.evaluate(hide % "false" + tell)
    opened.page.wait_for_timeout(2500)
    assert len(opened.asked) >= before + 4


def test_a_browser_without_access_is_asked_for_the_token(tab: Any) -> None:
    """It calls this machine by a name, as if the name had been made to point here."""
    opened = tab(PHONE, host="kvbm.localhost")
    opened.wait("KVBM_ADMIN_TOKEN")
    assert opened.page.is_hidden("main")
    opened.page.fill("#token", "a wrong one")
    opened.page.click("text=Send")
    opened.page.wait_for_selector("#token")
    assert opened.page.is_hidden("main")
    opened.page.fill("#token", TOKEN)
    opened.page.keyboard.press("Enter")
    opened.wait("live, ")
    assert opened.page.is_visible("#tiers")
    assert opened.page.is_hidden("#notice")


def test_it_says_that_caching_is_off_and_why(tab: Any, engine: Engine) -> None:
    """The last test: nothing turns it on again."""
    opened = tab(PHONE)
    opened.wait("live, ")
    engine.call(turn_off, "rank 1 <b>has</b> no memory")
    opened.wait("Caching is off: rank 1 <b>has</b> no memory.")
    engine.close()
    opened.wait("The engine does not answer")
