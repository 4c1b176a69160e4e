"""Names that clients choose, as kvplug keeps them: digests of fixed length, apart by tenant."""

from __future__ import annotations

import hashlib

__all__ = ["MAX_REQUEST_NAME", "request_name", "session_of", "tenant_of"]

MAX_REQUEST_NAME = 128
"""Longest request id that is kept as it is, in characters."""


def tenant_of(cache_salt: str | None) -> str:
    """Return the name of the tenant that a cache salt stands for; empty without one.

    Args:
        cache_salt: The user's own, of any length.
    """
    return _digest("tenant", cache_salt) if cache_salt else ""


def session_of(tenant: str, session_id: str | None) -> str | None:
    """Return the name of a tenant's session; None without one.

    Args:
        tenant: From `tenant_of`.
        session_id: The session as the client names it.
    """
    return None if session_id is None else _digest("session", tenant, session_id)


def request_name(request_id: str) -> str:
    """Return a request's id, or its beginning and a digest where it is too long to be kept."""
    if len(request_id) <= MAX_REQUEST_NAME:
        return request_id
    return f"{request_id[: MAX_REQUEST_NAME - 36]}...{_digest('request', request_id)}"


def _digest(*parts: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()
