"""``kvplug top``: what a running server does, in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from kvplug.cli.refusals import refusing

if TYPE_CHECKING:
    import httpx

    from kvplug.errors import KVPlugError
    from kvplug.observe.live import LiveState

SECONDS = 15.0
"""For a server to answer."""

MAX_STATE = 128 << 20
"""Longest answer that is read, in bytes."""


def top(
    url: Annotated[
        str,
        typer.Argument(metavar="URL", help="The server, as http://127.0.0.1:8000."),
    ] = "http://127.0.0.1:8000",
    once: Annotated[
        bool, typer.Option("--once", help="Print one state and end; so does a pipe.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one state as JSON.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="With --json: go on, one state a line.")
    ] = False,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="VLLM_API_KEY", help="The server's key.", show_default=False, show_envvar=True
        ),
    ] = None,
    interval: Annotated[
        float, typer.Option(min=1.0, max=3600.0, help="Seconds between two states.")
    ] = 1.0,
) -> None:
    """Show what a server does: its pool, its requests, its policies and tiers.

    The server's deployment must set `observe: {page: true}`. Ends with Ctrl-C; exits with code 2
    if the server does not answer.
    """
    with refusing():
        if as_json:
            _print_json(url, api_key, follow and not once, interval)
        else:
            _show(url, api_key, once or not sys.stdout.isatty(), interval)


def _print_json(url: str, key: str | None, follow: bool, interval: float) -> None:
    for state in _states(url, key, interval):
        typer.echo(state.model_dump_json())
        sys.stdout.flush()
        if not follow:
            return


def _show(url: str, key: str | None, once: bool, interval: float) -> None:
    from rich.console import Console
    from rich.live import Live

    from kvplug.cli.tables import console
    from kvplug.cli.top_view import Screen

    screen = Screen()
    if once:
        # Rates need two states.
        states = _states(url, key, 1.0)
        screen.take(next(states))
        screen.take(next(states))
        console(80).print(screen)
        return
    terminal = Console(highlight=False)
    states = _states(url, key, interval)
    screen.take(next(states))
    try:
        with Live(screen, console=terminal, screen=True, auto_refresh=False) as live:
            for state in states:
                screen.take(state)
                live.refresh()
    except KeyboardInterrupt:
        pass
    terminal.print(screen)


def _states(url: str, key: str | None, interval: float) -> Iterator[LiveState]:
    """Ask for the state again and again.

    Raises:
        KVPlugError: The server does not answer, or not with its state.
    """
    import httpx

    address = _address(url)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    # A proxy of the environment is for the internet; a redirect would take the key elsewhere.
    with httpx.Client(headers=headers, timeout=SECONDS, follow_redirects=False) as client:
        while True:
            began = time.monotonic()
            yield _state(client, address)
            time.sleep(max(0.0, interval - (time.monotonic() - began)))


def _address(url: str) -> str:
    base = url if "://" in url else f"http://{url}"
    base = base.rstrip("/")
    for ending in ("/v1", "/kvplug"):
        base = base.removesuffix(ending)
    return f"{base}/kvplug/state"


def _state(client: httpx.Client, address: str) -> LiveState:
    import httpx

    from kvplug.observe.live import LiveState, UnreadableSnapshot

    server = address.removesuffix("/kvplug/state")
    try:
        with client.stream("GET", address) as answer:
            body = bytearray()
            for part in answer.iter_bytes():
                body += part
                if len(body) > MAX_STATE:
                    raise _problem(server, f"answers with more than {MAX_STATE:,} bytes.")
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        # The text of an error may hold the whole exchange; its type and first line do.
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _problem(
            server, f"does not answer: {why}.", "check the address, and that the server is up."
        ) from None
    if answer.status_code == 401:
        raise _problem(server, "needs its API key.", "pass --api-key, or set VLLM_API_KEY.")
    if answer.status_code == 404:
        raise _problem(
            server,
            "has no page /kvplug.",
            "set `observe: {page: true}` in its deployment and start it with `kvplug serve`.",
        )
    try:
        found = LiveState.parse(bytes(body))
    except UnreadableSnapshot as error:
        if answer.status_code != 200:
            said = bytes(body[:300]).decode("utf-8", "replace")
            raise _problem(server, f"answers {answer.status_code}: {said}") from None
        raise _problem(
            server, f"answers with what is no state of kvplug: {error}.", "check the address."
        ) from None
    if not found.engines:
        raise _problem(server, f"shows nothing. {found.problem}")
    return found


def _problem(server: str, what: str, fix: str = "") -> KVPlugError:
    from kvplug.errors import KVPlugError
    from kvplug.plain_text import one_line, without_logins

    text = f"{without_logins(server)} {what}" + (f" Fix: {fix}" if fix else "")
    return KVPlugError(one_line(text, 600))
