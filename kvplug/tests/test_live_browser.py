"""The live page in headless Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from live_page import (
    HOSTILE,
    Other,
    browser,
    engine,
    made,
    needs_browser,
    refreshes,
    resize,
    scheme,
    serving,
    wait_for,
)

from kvplug.observe.live import BlockState, Outcome, PolicyState, RequestSpan, TierState

KEY = "the server's key"
WIDTHS = [1280, 400]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    needs_browser()
    with browser() as found:
        yield found


@pytest.fixture(autouse=True)
def _no_errors(driver: Any) -> Iterator[None]:
    driver.get_log("browser")
    yield
    # Chromium logs every answer of 401 and 503, and that `pixels` reads a canvas.
    expected = ("status of 401", "status of 503", "getImageData")
    said = [entry["message"] for entry in driver.get_log("browser")]
    assert [one for one in said if not any(part in one for part in expected)] == []


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with engine("browsed", interval=0.25), serving(Other("browsed")) as found:
        yield found


def text(driver: Any, name: str) -> str:
    return str(
        driver.execute_script("return document.getElementById(arguments[0]).innerText", name)
    )


def opened(driver: Any, url: str, width: int = 1280) -> None:
    resize(driver, width, 900)
    driver.get(f"{url}/kvplug")
    wait_for(lambda: len(refreshes(driver)) > 1, "refreshes")


def pixels(driver: Any) -> dict[str, int]:
    """Pixels of the pool's map by colour."""
    script = """
        const canvas = document.getElementById("map");
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        const found = {};
        for (let i = 0; i < data.length; i += 4) {
          if (!data[i + 3]) continue;
          const parts = [0, 1, 2].map((j) => data[i + j].toString(16).padStart(2, "0"));
          const hex = `#${parts.join("")}`;
          found[hex] = (found[hex] || 0) + 1;
        }
        return found;
    """
    found: dict[str, int] = driver.execute_script(script)
    return found


def colours(driver: Any) -> list[str]:
    script = """
        const style = getComputedStyle(document.documentElement);
        return [0, 1, 2, 3, 4, 5, 6].map((i) => style.getPropertyValue(`--s${i}`).trim())
          .map((c) => c.length === 4 ? "#" + [...c.slice(1)].map((x) => x + x).join("") : c);
    """
    found: list[str] = driver.execute_script(script)
    return found


def test_the_page_shows_the_state(driver: Any, url: str) -> None:
    opened(driver, url)
    snapshot = made(1)
    assert text(driver, "status") == "live"
    assert text(driver, "model") == snapshot.model
    for state in (BlockState.HELD, BlockState.PARTLY_EVICTED, BlockState.APPROXIMATE):
        assert text(driver, f"state-{state.value}") == f"{snapshot.states[state]:,}"
    assert text(driver, "figure-running") == "22" and text(driver, "figure-waiting") == "2"
    wait_for(lambda: text(driver, "figure-computed")[:1].isdigit(), "a rate")
    rows = driver.execute_script("return document.getElementById('request-rows').children.length")
    assert rows == len(snapshot.requests)
    for part in ("foresight", "snapkv", "failed 2"):
        assert part in text(driver, "policy-rows")
    assert "loading takes longer than computing" in text(driver, "heat-rows")
    assert "5.5 GiB of 8.0 GiB" in text(driver, "tier-rows")
    assert text(driver, "layer-cells").split()[:3] == ["100", "98", "95"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_map_has_a_cell_for_each_block(driver: Any, url: str, dark: bool) -> None:
    scheme(driver, dark)
    opened(driver, url)
    found, by_state = pixels(driver), colours(driver)
    # 4,096 blocks on this width are squares of 6 px and a gap of 1.
    states = made(1).states
    side = round((found[by_state[2]] / states[2]) ** 0.5)
    assert side > 3
    for state in (2, 3, 4, 5, 6):
        assert found[by_state[state]] == states[state] * side**2
    scheme(driver, False)


def test_colours_follow_the_preference_at_once(driver: Any, url: str) -> None:
    opened(driver, url)
    light = pixels(driver)
    scheme(driver, True)
    wait_for(lambda: not set(pixels(driver)) & set(light), "the dark colours")
    scheme(driver, False)
    wait_for(lambda: set(pixels(driver)) == set(light), "the light ones")


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_page_and_nothing_moves(
    driver: Any, url: str, width: int
) -> None:
    opened(driver, url, width)
    wide = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scroll, client = driver.execute_script(wide)
    assert scroll == client == width
    # After the first state, no refresh moves anything.
    driver.execute_script(
        "window.shifts = 0; new PerformanceObserver((list) => {"
        " for (const one of list.getEntries()) window.shifts += one.value;"
        "}).observe({ type: 'layout-shift', buffered: false });"
    )
    before = len(refreshes(driver))
    wait_for(lambda: len(refreshes(driver)) > before + 3, "refreshes")
    assert driver.execute_script("return window.shifts") == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_everything_is_reached_by_keyboard_and_shows_it(driver: Any, url: str, width: int) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    opened(driver, url, width)
    walked, outlined = [], []
    for _ in range(14):
        ActionChains(driver).send_keys(Keys.TAB).perform()
        name, outline = driver.execute_script(
            "const e = document.activeElement, s = getComputedStyle(e);"
            "return [e.id || e.getAttribute('aria-labelledby') || e.tagName, s.outlineStyle];"
        )
        walked.append(name)
        outlined.append(outline)
        if name == "heat-title":
            break
    assert walked[0] == "A" and outlined == ["solid"] * len(outlined)
    assert walked[1:3] == ["map", "requests-title"]
    assert walked[3:] == ["policies-title", *["SUMMARY"] * 4, "heat-title"]


def test_arrow_keys_tell_block_by_block(driver: Any, url: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    opened(driver, url)
    pool = driver.find_element(By.ID, "map")
    for key, said in (
        (Keys.ARROW_RIGHT, "block 0: reserved"),
        (Keys.ARROW_RIGHT, "block 1: held"),
        (Keys.ARROW_DOWN, "block 33: held"),
        (Keys.ARROW_UP, "block 1: held"),
        (Keys.HOME, "block 0: reserved"),
        (Keys.ARROW_LEFT, "block 0: reserved"),
        (Keys.END, "block 4,095: free"),
    ):
        pool.send_keys(key)
        assert text(driver, "block").startswith(said)


def test_the_page_asks_for_the_key_and_keeps_it_for_the_tab(driver: Any) -> None:
    from selenium.webdriver.common.by import By

    with engine("locked", interval=0.25), serving(Other("locked", [KEY])) as url:
        resize(driver, 1280, 900)
        driver.get(f"{url}/kvplug")
        field = driver.find_element(By.ID, "key")
        wait_for(field.is_displayed, "the form")
        assert driver.switch_to.active_element == field
        field.send_keys("wrong\n")
        wait_for(lambda: "does not take" in text(driver, "key-problem"), "the refusal")
        assert not refreshes(driver)
        field.send_keys(f"{KEY}\n")
        wait_for(lambda: len(refreshes(driver)) > 1, "refreshes")
        assert not field.is_displayed()
        driver.refresh()
        wait_for(lambda: len(refreshes(driver)) > 1, "refreshes after a reload")
        assert KEY not in driver.page_source


def test_hostile_names_stay_names(driver: Any) -> None:
    wicked = HOSTILE
    load: dict[str, Any] = {
        "interval": 0.25,
        "requests": 0,
        "listed": tuple(
            RequestSpan(id=name, status=wicked, prompt=1, computed=0, output=0)
            for name in (wicked, "__proto__", "constructor", "")
        ),
        "model": wicked,
        "kvplug": wicked,
        "policies": (
            PolicyState(kind=wicked, name=wicked, exact=True, counters={wicked: 1.0, "</b>": 2.0}),
        ),
        "tiers": (TierState(name=wicked),),
        "outcomes": tuple(
            Outcome(level=level, cause=cause, count=1, unit=wicked)
            for level in (wicked, "__proto__")
            for cause in (wicked, "__proto__", "constructor")
        ),
    }

    with engine("hostile", **load), serving(Other("hostile")) as url:
        opened(driver, url)
        assert driver.title == "kvplug"
        assert driver.execute_script("return document.images.length") == 0
        assert text(driver, "model") == wicked
        assert text(driver, "request-rows").count(wicked) >= 2
        assert wicked in text(driver, "policy-rows") and wicked in text(driver, "heat-rows")
        assert wicked in text(driver, "tier-rows")


def test_a_lost_engine_is_told_and_found_again(driver: Any) -> None:
    with serving(Other("comes and goes")) as url:
        with engine("comes and goes", interval=0.25):
            opened(driver, url)
        wait_for(lambda: "observe: {page: true}" in text(driver, "problem"), "the problem")
        with engine("comes and goes", interval=0.25):
            wait_for(lambda: text(driver, "status") == "live", "the engine")
            wait_for(lambda: text(driver, "problem") == "", "the problem's end")


def test_one_engine_of_several_is_chosen(driver: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    with (
        engine("two", 0, interval=0.25),
        engine("two", 1, interval=0.25, blocks=2048),
        serving(Other("two", engines=2)) as url,
    ):
        opened(driver, url)
        wait_for(lambda: "4,096 blocks" in text(driver, "pool-note"), "the first engine")
        Select(driver.find_element(By.ID, "engine")).select_by_value("1")
        wait_for(lambda: "2,048 blocks" in text(driver, "pool-note"), "the second engine")


def test_a_hundred_thousand_blocks_are_drawn(driver: Any) -> None:
    with (
        engine("large", interval=0.25, blocks=100_000, requests=256),
        serving(Other("large")) as url,
    ):
        opened(driver, url)
        assert "100,000 blocks" in text(driver, "pool-note")
        found, by_state = pixels(driver), colours(driver)
        states = made(1, blocks=100_000, requests=256).states
        each = found[by_state[2]] / states[2]
        assert each in (1, 2, 3, 4)
        for state in (2, 3, 4, 5, 6):
            assert found[by_state[state]] == states[state] * each
