"""A server that speaks the Redis protocol: Redis, Valkey, and others."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, SecretStr

from kvplug.contract import (
    EngineView,
    PolicyOptions,
    Size,
    Tier,
    TierError,
    TierOptions,
    TierPlace,
    TierUsage,
)
from kvplug_policies.bounded import Bounded, require_package
from kvplug_policies.entry_names import entry_name, identity_name

_FORM = (
    "it must be redis://[user[:password]@]host[:port][/database], with %2F for / and %23 for # in "
    "a password"
)

_QUERY = ("client_name", "db", "password", "username")

BATCH = 8 << 20
"""Bytes of payloads that are sent before the answers are read."""


class Redis(Tier):
    """Stores payloads as values of a server.

    What the server drops, by its own memory policy or after ``ttl``, is a miss. Under the memory
    policy ``noeviction`` a full server refuses, and nothing more is stored until room is made.
    """

    name = "redis"
    changes = "stores KV that leaves the engine's pool in a Redis or Valkey server"
    shared = True
    durable = True

    class Options(TierOptions):
        """Options of ``redis``.

        Attributes:
            url: The server.
            password_file: File that holds the password.
            prefix: Begins all keys.
            ttl: Seconds a chunk is kept.
            timeout: Seconds that one call may take.
            connections: Connections of each worker.
            max_value: Bytes of a payload above which it is not stored.
        """

        url: SecretStr = Field(
            description="`redis://[user[:password]@]host[:port][/database]`, `rediss://` with TLS, "
            "or `unix://path`; never shown"
        )
        password_file: str = Field(
            "", description="file whose first line is the password, instead of one in `url`"
        )
        prefix: str = Field("kvplug", max_length=64, description="begins all keys")
        ttl: int = Field(
            0, ge=0, description="seconds after which the server forgets a chunk; 0 for never"
        )
        timeout: float = Field(
            2.0, ge=0.01, le=600, description="seconds that one call may take before it is given up"
        )
        connections: int = Field(4, ge=1, le=256, description="connections of each worker")
        max_value: Size = Field(
            64 << 20, ge=1 << 10, le=512 << 20, description="bytes of the largest payload stored"
        )

        @property
        def places(self) -> frozenset[str]:
            server = self.url.get_secret_value().rpartition("@")[2]
            return frozenset({f"{server} {self.prefix}"})

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        require_package("redis", "redis")
        url = self.options.url.get_secret_value()
        if not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("url must begin with redis://, rediss:// or unix://")
        if problem := _problem(url, bool(self.options.password_file)):
            raise ValueError(problem)

    def open(self, place: TierPlace) -> None:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        options = self.options
        self._place = place
        self._start = f"{options.prefix}:{identity_name(place.identity)}:"
        self._facts: dict[str, str] = {}
        self._entries = self._used = 0
        settings: dict[str, Any] = {}
        if options.password_file:
            settings["password"] = _password(options.password_file)
        try:
            self._pool = redis.ConnectionPool.from_url(
                options.url.get_secret_value(),
                max_connections=options.connections + 1,
                socket_timeout=options.timeout,
                socket_connect_timeout=options.timeout,
                socket_keepalive=True,
                # A second try is made here, within the time of the call.
                retry=Retry(NoBackoff(), 0),
                **settings,
            )
        except (ValueError, TypeError):
            # What the client says quotes parts of the URL.
            raise TierError("bad url", f"{_FORM}; mend url") from None
        self._client = redis.Redis(connection_pool=self._pool)
        self._bounded = Bounded("redis", options.connections, options.timeout)
        try:
            self._facts = self._call(self._ask)
        except TierError as error:
            if error.cause == "wrong password":
                self.close()
                raise
            self._facts = {"server": f"not reached at start ({error})"}

    def _ask(self) -> dict[str, str]:
        found = self._client.info("server")
        name = "valkey" if "valkey_version" in found else "redis"
        version = found.get("valkey_version") or found.get("redis_version", "")
        facts = {"server": f"{name} {version}"}
        memory = self._client.info("memory")
        policy, most = memory.get("maxmemory_policy", ""), int(memory.get("maxmemory", 0))
        facts["memory"] = f"{most:,} bytes at most, {policy}" if most else "no limit of its own"
        return facts

    def described(self) -> Mapping[str, str]:
        return self._facts

    def _call(self, function: Any, *arguments: Any) -> Any:
        return self._bounded.run(self._named, function, *arguments)

    def _named(self, function: Any, *arguments: Any) -> Any:
        """Call the client; after a connection was lost, once more on a new one.

        Raises:
            TierError: It failed.
        """
        import redis

        for again in (True, False):
            try:
                return function(*arguments)
            except redis.AuthenticationError as error:
                raise TierError("wrong password", f"{error}; mend url or password_file") from None
            except redis.TimeoutError as error:
                raise TierError("too slow", str(error)) from None
            except redis.ConnectionError as error:
                # A server that was restarted has dropped every connection of the pool.
                with contextlib.suppress(redis.RedisError, OSError):
                    self._pool.disconnect()
                if not again or isinstance(error, redis.BusyLoadingError):
                    raise TierError("unreachable", str(error)) from None
            except redis.RedisError as error:
                raise TierError(_cause(error), str(error)) from None
            except OSError as error:
                raise TierError("unreachable", str(error)) from None
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                # The client reads an answer as what the command should have given.
                raise TierError(
                    "refused", f"an answer that is none ({type(error).__name__})"
                ) from None
        raise AssertionError

    def _key(self, key: bytes, rank: int) -> str:
        return self._start + entry_name(key, rank, self._place.world)

    def put(self, items: Sequence[tuple[bytes, Any]]) -> list[str]:
        answers = [""] * len(items)
        batch: list[tuple[int, bytes, memoryview]] = []
        batches = [batch]
        size = 0
        for i, (key, payload) in enumerate(items):
            given = memoryview(payload).cast("B")
            if len(given) > self.options.max_value:
                answers[i] = "too large"
                continue
            if batch and size + len(given) > BATCH:
                batch, size = [], 0
                batches.append(batch)
            batch.append((i, key, given))
            size += len(given)
        failures: list[TierError] = []
        calls = [(self._named, self._put, batch) for batch in batches if batch]
        stored = 0
        for (*_, batch), found in zip(calls, self._bounded.run_all(calls), strict=True):
            if isinstance(found, TierError):
                failures.append(found)
                found = [found.cause] * len(batch)
            for (i, _, given), answer in zip(batch, found, strict=True):
                answers[i] = answer
                if not answer:
                    stored += 1
                    self._entries += 1
                    self._used += len(given)
        if failures and not stored:
            raise failures[0]
        return answers

    def _put(self, batch: Sequence[tuple[int, bytes, memoryview]]) -> list[str]:
        with self._client.pipeline(transaction=False) as pipeline:
            for _, key, payload in batch:
                pipeline.set(
                    self._key(key, self._place.rank),
                    payload,
                    nx=True,
                    ex=self.options.ttl or None,
                )
            found = pipeline.execute(raise_on_error=False)
        # None is the answer for what is there already.
        return [_cause(one) if isinstance(one, Exception) else "" for one in found]

    def get(self, keys: Sequence[bytes]) -> list[Any]:
        names = [self._key(key, self._place.rank) for key in keys]
        found = self._call(self._get, names) if names else []
        most = self.options.max_value
        return [None if one is None or len(one) > most else memoryview(one) for one in found]

    def _get(self, names: Sequence[str]) -> list[bytes | None]:
        with self._client.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.get(name)
            found = pipeline.execute(raise_on_error=False)
        # What is no string is no payload either: the host refuses an empty one, and removes it.
        return [one if one is None or isinstance(one, bytes) else _nothing(one) for one in found]

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        ranks = self._place.ranks
        names = [self._key(key, rank) for key in keys for rank in ranks]
        found = self._call(self._has, names) if names else []
        each = len(ranks)
        return [all(found[i * each : (i + 1) * each]) for i in range(len(keys))]

    def _has(self, names: Sequence[str]) -> list[bool]:
        with self._client.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.strlen(name)
            found = pipeline.execute(raise_on_error=False)
        most = self.options.max_value
        return [not _other_kind(one) and 0 < one <= most for one in found]

    def remove(self, keys: Sequence[bytes]) -> None:
        names = [self._key(key, rank) for key in keys for rank in self._place.ranks]
        if names:
            self._call(self._client.unlink, *names)

    def usage(self) -> TierUsage:
        return TierUsage(self._entries, self._used, 0)

    def close(self) -> None:
        import redis

        self._bounded.close()
        with contextlib.suppress(redis.RedisError, OSError):
            self._pool.disconnect()


def _nothing(answer: Any) -> bytes:
    """Stands for a value that is no string.

    Raises:
        redis.RedisError: The answer is any other error.
        TypeError: It is none to a get.
    """
    if not _other_kind(answer):
        raise TypeError(f"{type(answer).__name__} for a value")
    return b""


def _other_kind(answer: Any) -> bool:
    """True for the answer about a value that is no string: this key's trouble alone.

    Raises:
        redis.RedisError: The answer is any other error.
    """
    if isinstance(answer, Exception):
        if not str(answer).startswith("WRONGTYPE"):
            raise answer
        return True
    return False


def _problem(url: str, password_file: bool) -> str:
    """What is wrong with a URL, without any of its values; empty for nothing."""
    try:
        parts = urlsplit(url)
        valid = parts.port is None or parts.port > 0
        query = parse_qs(parts.query, keep_blank_values=True)
    except ValueError:
        valid = False
    if not valid or parts.fragment:
        return f"url is wrong: {_FORM}"
    others = sorted(n for n in query if n not in _QUERY and not n.startswith("ssl_"))
    if others:
        return (
            f"url sets {', '.join(one[:32] for one in others)}, which the tier sets by options of "
            f"its own; after `?` may stand {', '.join(_QUERY)} and those that begin with ssl_"
        )
    if password_file and (parts.password or "password" in query):
        return "url has a password and password_file names another one"
    return ""


def _password(path: str) -> str:
    try:
        with Path(path).expanduser().open(encoding="utf-8") as file:
            return file.readline(4096).rstrip("\r\n")
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise TierError("no password", f"password_file {path} cannot be read: {cause}") from None


def _cause(error: Exception) -> str:
    """A few words for what a server answered."""
    import redis

    text = str(error)
    if isinstance(error, redis.OutOfMemoryError) or text.startswith("OOM"):
        return "full"
    if isinstance(error, redis.ReadOnlyError) or text.startswith(("READONLY", "MISCONF")):
        return "read only"
    if isinstance(error, redis.AuthenticationError) or text.startswith(("NOAUTH", "WRONGPASS")):
        return "wrong password"
    if isinstance(error, redis.exceptions.NoPermissionError) or text.startswith("NOPERM"):
        return "not permitted"
    return "refused"
