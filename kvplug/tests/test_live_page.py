"""The page's middleware and `kvplug top`, on a server without an engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import httpx
import pytest
from live_page import HOSTILE, Other, engine, made, serving
from typer.testing import CliRunner, Result

from kvplug.cli import app as command
from kvplug.hosts.vllm import page as middleware
from kvplug.observe.live import BlockState, LiveState, PolicyState
from kvplug.observe.page import FILES, file, html

KEY = "the server's key"
CLI = CliRunner()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with engine("page", interval=0.2), serving(Other("page")) as found:
        yield found


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    with (
        engine("guarded page", interval=0.2),
        serving(Other("guarded page", ["another", KEY])) as found,
    ):
        yield found


def test_the_page_is_served_with_a_policy_that_lets_nothing_in(url: str) -> None:
    answer = httpx.get(f"{url}/kvplug")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy
    assert "unsafe" not in policy and "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    for state in BlockState:
        assert state.label in answer.text
    assert httpx.head(f"{url}/kvplug").content == b""


def test_nothing_of_the_page_comes_from_elsewhere(url: str) -> None:
    text = html().decode()
    named = re.findall(r'(?:src|href)="([^"]+)"', text)
    files = [name for name in named if not name.startswith(("#", "data:"))]
    assert len(files) == 4
    for name in files:
        assert httpx.get(f"{url}/{name}").status_code == 200
    # What would need 'unsafe-inline'.
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\bsrc=)", text)
    for name in ("page.js", "page.css"):
        assert not re.search(
            r"https?:|//\w+\.\w|innerHTML|insertAdjacent|eval\(", file(name).decode()
        )


@pytest.mark.parametrize("name", FILES)
def test_files_have_their_types(url: str, name: str) -> None:
    answer = httpx.get(f"{url}/kvplug/static/{name}")
    assert answer.content == file(name) and answer.headers["content-type"] == FILES[name][1]


def test_the_charting_library_is_the_one_that_was_published() -> None:
    # uplot 1.6.32 of the npm registry.
    digests = {
        "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
        "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
        "uPlot.LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
    }
    assert {name: sha256(file(name)).hexdigest() for name in digests} == digests


@pytest.mark.parametrize(
    "path",
    ["/kvplug/static/../page.py", "/kvplug/static/page.html", "/kvplug/static/", "/kvplug/x"],
)
def test_no_other_file_is_served(url: str, path: str) -> None:
    answer = httpx.request("GET", httpx.URL(url).copy_with(raw_path=path.encode()))
    assert answer.status_code == 404


def test_other_paths_are_the_servers(url: str) -> None:
    for path in ("/", "/v1/models", "/kvplugs", "/metrics"):
        answer = httpx.get(f"{url}{path}")
        assert (answer.status_code, answer.text) == (404, "Not Found")


def test_the_page_is_read_only(url: str) -> None:
    for path in ("/kvplug", "/kvplug/state", "/kvplug/events"):
        answer = httpx.post(f"{url}{path}", content=b"{}")
        assert answer.status_code == 405 and answer.headers["allow"] == "GET, HEAD"


def test_a_slash_at_the_end_leads_to_the_page(url: str) -> None:
    answer = httpx.get(f"{url}/kvplug/", follow_redirects=True)
    assert answer.status_code == 200 and str(answer.url) == f"{url}/kvplug"


def test_the_state_is_the_engines(url: str) -> None:
    answer = httpx.get(f"{url}/kvplug/state", timeout=60)
    assert answer.headers["cache-control"] == "no-store"
    state = LiveState.parse(answer.content)
    assert (state.problem, state.expected) == ("", 1)
    assert [one.id for one in state.engines[0].requests] == [one.id for one in made(1).requests]


def events(url: str, count: int, headers: Any = None) -> list[LiveState]:
    found: list[LiveState] = []
    with httpx.stream("GET", f"{url}/kvplug/events", headers=headers, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        for line in answer.iter_lines():
            if line.startswith("data: "):
                found.append(LiveState.parse(line[6:].encode()))
                if len(found) == count:
                    break
    return found


def test_events_come_as_the_engine_goes_on(url: str) -> None:
    steps = [state.engines[0].totals.steps for state in events(url, 3)]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("path", ["/kvplug/state", "/kvplug/events"])
@pytest.mark.parametrize(
    "given",
    [None, "", KEY, f"Bearer {KEY}x", "Bearer", f"Basic {KEY}", f"Bearer  {KEY}"],
)
def test_data_is_behind_the_servers_key(guarded: str, path: str, given: str | None) -> None:
    headers = {"authorization": given} if given is not None else {}
    answer = httpx.get(f"{guarded}{path}", headers=headers)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert "chatcmpl" not in answer.text
    # The page itself holds nothing.
    assert httpx.get(f"{guarded}/kvplug").status_code == 200


def test_each_of_the_servers_keys_opens(guarded: str) -> None:
    for key in (KEY, "another"):
        for scheme in ("Bearer", "bearer"):
            headers = {"authorization": f"{scheme} {key}"}
            assert httpx.get(f"{guarded}/kvplug/state", headers=headers, timeout=60).is_success
    assert events(guarded, 1, {"authorization": f"Bearer {KEY}"})


def test_a_key_of_the_environment_guards_as_well(
    url: str, guarded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "from outside")
    assert httpx.get(f"{url}/kvplug/state").status_code == 401
    headers = {"authorization": "Bearer from outside"}
    assert httpx.get(f"{url}/kvplug/state", headers=headers, timeout=60).is_success
    # The command line's keys come before it.
    assert httpx.get(f"{guarded}/kvplug/state", headers=headers).status_code == 401


def test_a_server_without_a_publishing_engine_says_what_to_do() -> None:
    with serving(Other("silent")) as url:
        for path in ("/kvplug/state", "/kvplug/events"):
            answer = httpx.get(f"{url}{path}", timeout=60)
            assert answer.status_code == 503 and "observe: {page: true}" in answer.text
        assert LiveState.parse(httpx.get(f"{url}/kvplug/state", timeout=60).content).engines == ()
    with serving(Other(None)) as url:
        answer = httpx.get(f"{url}/kvplug/state", timeout=60)
        assert answer.status_code == 503 and "without kvplug" in answer.text


def test_engines_of_a_data_parallel_server_are_shown_together() -> None:
    with (
        engine("ranks_dp0", 0, interval=0.2),
        engine("ranks_dp2", 2, interval=0.2),
        serving(Other("ranks", engines=3)) as url,
    ):
        state = LiveState.parse(httpx.get(f"{url}/kvplug/state", timeout=60).content)
    assert [one.engine for one in state.engines] == [0, 2] and state.expected == 3
    assert state.problem.startswith("1 of 3 engines do not show their state")


def test_what_is_no_snapshot_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine("liar", interval=0.2) as one, serving(Other("liar")) as url:
        for lie in (b"{}", b'{"a":\n1}', made(0).json_bytes().replace(b",", b",\n", 1)):
            monkeypatch.setattr(one.publisher, "_take", lambda lie=lie: lie)
            assert httpx.get(f"{url}/kvplug/state", timeout=60).status_code == 503


def test_so_many_pages_and_no_more(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_WATCHERS", 1)
    with httpx.stream("GET", f"{url}/kvplug/events", timeout=60) as answer:
        assert answer.status_code == 200
        # An iterator that is dropped closes the stream.
        lines = answer.iter_lines()
        next(lines)
        assert httpx.get(f"{url}/kvplug/state", timeout=60).status_code == 503


def test_an_open_page_keeps_no_server_from_ending() -> None:
    # `serving` fails if the server has not ended in time.
    with engine("ending", interval=0.2):
        with serving(Other("ending")) as url:
            client = httpx.Client(timeout=60)
            answer = client.send(client.build_request("GET", f"{url}/kvplug/events"), stream=True)
            lines = answer.iter_lines()
            next(lines)
        answer.close()
        client.close()


# -- kvplug top ------------------------------------------------------------------------------------


def top(*arguments: str, **environment: str) -> Result:
    env = {"VLLM_API_KEY": "", "COLUMNS": "80", "NO_COLOR": "1", **environment}
    return CLI.invoke(command, ["top", *arguments], env=env)


def test_top_shows_the_state_in_80_columns(url: str) -> None:
    found = top(url, "--once")
    assert found.exit_code == 0, found.output
    lines = found.output.splitlines()
    assert max(len(line) for line in lines) <= 80
    text = found.output
    for part in ("SmolLM2-135M-Instruct", "4,096 blocks", "snapkv", "approximate", "host", "tok/s"):
        assert part in text
    # A made-up engine computes 2,000 tokens a snapshot and five of them a second.
    assert re.search(r"computed \d{1,2},\d{3} tok/s", text)
    assert "▓ held, partly evicted 25" in text
    assert re.search(r"chatcmpl-000\S* +running", text)


def test_a_pipe_gets_one_state(url: str) -> None:
    assert top(url).output.count("blocks, ") == 1


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/kvplug", "/v1/"])
def test_the_address_may_be_that_of_the_api(url: str, ending: str) -> None:
    found = top(url.removeprefix("http://") + ending, "--once", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.output)["engines"][0]["blocks"] == 4096


def test_top_needs_the_key(guarded: str) -> None:
    refused = top(guarded, "--once")
    assert refused.exit_code == 2
    assert refused.output.strip() == (
        f"{guarded} needs its API key. Fix: pass --api-key, or set VLLM_API_KEY."
    )
    assert top(guarded, "--once", "--json", "--api-key", KEY).exit_code == 0
    assert top(guarded, "--once", "--json", VLLM_API_KEY=KEY).exit_code == 0


def test_top_says_what_is_missing_in_one_line() -> None:
    dead = top("http://127.0.0.1:9", "--once")
    assert dead.exit_code == 2 and dead.output.count("\n") == 1
    assert "does not answer" in dead.output and "Fix:" in dead.output
    wrong = top("http://[", "--once")
    assert wrong.exit_code == 2 and wrong.output.count("\n") == 1
    with serving(Other("off")) as url:
        off = top(url, "--once")
        assert off.exit_code == 2 and "observe: {page: true}" in off.output
        # A server of something else.
        other = top(f"{url}/else", "--once")
        assert other.exit_code == 2 and "has no page /kvplug" in other.output
    secret = top("http://user:hunter2@127.0.0.1:9", "--once")
    assert "hunter2" not in secret.output


def test_names_do_not_reach_the_terminal_as_commands() -> None:
    wicked = "\x1b[2J\x1b]0;owned\x07[bold red]x[/]\n"
    with (
        engine(
            "wicked",
            interval=0.2,
            requests=0,
            policies=(PolicyState(kind=wicked, name=HOSTILE, exact=True),),
            **{"model": wicked},
        ),
        serving(Other("wicked")) as url,
    ):
        found = top(url, "--once")
    assert found.exit_code == 0
    assert "\x1b" not in found.output and "\x07" not in found.output
    assert "[bold red]x[/]" in found.output
