"""Sessions that keep their segments: seen, idle, ended."""

from __future__ import annotations

from dataclasses import replace

from test_segment_quota import entry, names

from kvplug.reuse.entry import CatalogEntry
from kvplug.reuse.sessions import Sessions


def of(session: str, name: str, used: float, tenant: str = "") -> CatalogEntry:
    made = entry(name, used)
    made.session = session
    made.fingerprint = replace(made.fingerprint, tenant=tenant)
    return made


def test_a_segment_of_no_session_is_not_spared() -> None:
    sessions, one = Sessions(60), of("", "a", 0)
    assert sessions.use(one) == [] and not sessions.spares(one) and len(sessions) == 0


def test_a_session_spares_its_segments_until_it_is_idle() -> None:
    sessions = Sessions(60)
    one, two = of("s", "a", 0), of("s", "b", 50)
    sessions.use(one)
    sessions.use(two)
    assert sessions.end_idle(110) == [] and sessions.spares(one)
    assert names(sessions.end_idle(110.5)) == ["a", "b"]
    assert not sessions.spares(one) and not sessions.spares(two) and len(sessions) == 0


def test_a_use_spares_the_others_of_an_idle_session_again() -> None:
    sessions = Sessions(60)
    one, two = of("s", "a", 0), of("s", "b", 0)
    sessions.use(one)
    sessions.use(two)
    sessions.end_idle(100)
    two.last_used = 100
    assert names(sessions.use(two)) == ["a"]
    assert sessions.spares(one) and sessions.spares(two)
    assert sessions.use(two) == []


def test_an_older_use_does_not_make_a_session_older() -> None:
    sessions = Sessions(60)
    sessions.use(of("s", "a", 100))
    sessions.use(of("s", "b", 0))
    assert sessions.end_idle(150) == []


def test_only_idle_sessions_end() -> None:
    sessions = Sessions(60)
    for name, used in (("old", 0.0), ("new", 100.0)):
        sessions.use(of(name, name, used))
    assert names(sessions.end_idle(120)) == ["old"]
    assert len(sessions) == 1


def test_ending_a_session_frees_its_segments() -> None:
    sessions = Sessions(60)
    one, two, other = of("s", "a", 0), of("s", "b", 1), of("t", "c", 0)
    for each in (one, two, other):
        sessions.use(each)
    assert names(sessions.end("s")) == ["a", "b"]
    assert (one.session, two.session, other.session) == ("", "", "t")
    assert not sessions.spares(one) and sessions.spares(other)
    assert sessions.end("s") == []


def test_an_idle_session_can_be_ended() -> None:
    sessions, one = Sessions(60), of("s", "a", 0)
    sessions.use(one)
    sessions.end_idle(100)
    assert names(sessions.end("s")) == ["a"] and one.session == ""


def test_tenants_sessions_of_one_name_are_apart() -> None:
    sessions = Sessions(60)
    mine, theirs = of("s", "a", 0, "me"), of("s", "b", 0, "them")
    sessions.use(mine)
    sessions.use(theirs)
    assert names(sessions.end("s", "me")) == ["a"]
    assert sessions.spares(theirs)
    assert names(sessions.end("s")) == ["b"]


def test_a_session_ends_with_its_last_segment() -> None:
    sessions = Sessions(60)
    one, two = of("s", "a", 0), of("s", "b", 0)
    sessions.use(one)
    sessions.use(two)
    sessions.leave(one)
    assert len(sessions) == 1
    sessions.leave(one)
    sessions.leave(two)
    assert len(sessions) == 0 and sessions.end_idle(1000) == []


def test_the_session_that_computes_a_text_again_takes_it_over() -> None:
    sessions, one = Sessions(60), of("s", "a", 0)
    sessions.use(one)
    sessions.adopt(one, "")
    assert one.session == "s" and len(sessions) == 1
    sessions.adopt(one, "t")
    assert one.session == "t" and len(sessions) == 0
    sessions.use(one)
    assert names(sessions.end("t")) == ["a"]
