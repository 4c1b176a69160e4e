from __future__ import annotations

import pytest

from kvplug.client_names import MAX_REQUEST_NAME, request_name, session_of, tenant_of


@pytest.mark.parametrize("name", ["chat", "x" * 1_000_000, "\ud800", "ü\n", ""])
def test_a_session_is_a_digest_and_apart_by_tenant(name: str) -> None:
    found = {session_of(tenant_of(salt), name) for salt in (None, "a", "b", "a" * 100_000)}
    assert len(found) == 4
    assert all(one is not None and len(one) == 32 for one in found)


def test_no_name_is_no_session_and_no_salt_no_tenant() -> None:
    assert session_of(tenant_of("a"), None) is None
    assert tenant_of(None) == tenant_of("") == ""


def test_where_a_tenant_ends_and_a_session_begins_cannot_be_shifted() -> None:
    assert session_of("ab", "c") != session_of("a", "bc")


def test_a_long_request_id_is_cut_and_stays_distinct() -> None:
    assert request_name("r" * MAX_REQUEST_NAME) == "r" * MAX_REQUEST_NAME
    one, two = (request_name("r" * 100_000 + end) for end in "ab")
    assert one != two and len(one) < 2 * MAX_REQUEST_NAME
