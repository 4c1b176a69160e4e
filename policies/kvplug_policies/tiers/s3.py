"""A bucket of a store that speaks the S3 protocol."""

from __future__ import annotations

import configparser
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

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

FULL = "full or broken"
"""Cause of what a store answers when it is out of room, and when something in it failed: the
protocol has one code for both."""

_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_NO_ROOM = re.compile(r"status code: 507\b")


class S3(Tier):
    """Stores payloads as objects, ``PREFIX/IDENTITY/ab/KEY.RANK-WORLD``.

    Nothing is removed but what the deployment removes: give the bucket a rule that lets objects
    expire.
    """

    name = "s3"
    changes = "stores KV that leaves the engine's pool in a bucket of an S3 store"
    shared = True
    durable = True

    class Options(TierOptions):
        """Options of ``s3``.

        Attributes:
            bucket: The bucket.
            endpoint: URL of the store.
            prefix: Begins all names.
            region: Region of the bucket.
            credentials: File with the credentials.
            profile: Section of that file.
            anonymous: Send unsigned requests.
            timeout: Seconds that one call may take.
            connections: Requests of each worker at once.
            max_value: Bytes of a payload above which it is not stored.
        """

        bucket: str = Field(min_length=1, max_length=255, description="the bucket; it must exist")
        endpoint: str = Field(
            "", description="URL of the store, `http://` without TLS; empty for Amazon's"
        )
        prefix: str = Field("kvplug", max_length=255, description="begins all names of objects")
        region: str = Field("us-east-1", min_length=1, description="region of the bucket")
        credentials: str = Field(
            "",
            description="file with `aws_access_key_id`, `aws_secret_access_key` and perhaps "
            "`aws_session_token`; empty for the environment's",
        )
        profile: str = Field("default", min_length=1, description="section of that file")
        anonymous: bool = Field(False, description="send requests without a signature")
        timeout: float = Field(
            10.0,
            ge=0.01,
            le=600,
            description="seconds that one call may take before it is given up",
        )
        connections: int = Field(8, ge=1, le=256, description="requests of each worker at once")
        max_value: Size = Field(
            256 << 20, ge=1 << 10, le=1 << 30, description="bytes of the largest payload stored"
        )

        @model_validator(mode="after")
        def _credentials_of_one_kind(self) -> S3.Options:
            if self.anonymous and self.credentials:
                raise ValueError("anonymous requests take no credentials")
            if not self.credentials and "profile" in self.model_fields_set:
                raise ValueError("profile needs credentials, the file that has it")
            return self

        @property
        def places(self) -> frozenset[str]:
            return frozenset({f"{self.endpoint} {self.bucket}/{self.prefix.strip('/')}"})

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        require_package("obstore", "s3")
        endpoint = self.options.endpoint
        if endpoint and not endpoint.startswith(("http://", "https://")):
            raise ValueError("endpoint must begin with http:// or https://")
        if "@" in endpoint:
            raise ValueError(
                "endpoint must not hold a user or a password, which belong into the file that "
                "credentials names, or into the environment"
            )

    def open(self, place: TierPlace) -> None:
        from obstore.store import S3Store

        options = self.options
        self._place = place
        parts = [options.prefix.strip("/"), identity_name(place.identity)]
        self._start = "/".join(part for part in parts if part)
        self._entries = self._used = 0
        self._conditional = True
        config: dict[str, Any] = {"region": options.region}
        if options.endpoint:
            config["endpoint"] = options.endpoint
        if options.anonymous:
            config["skip_signature"] = True
        elif options.credentials:
            config |= _credentials(options.credentials, options.profile)
        timeout = timedelta(seconds=options.timeout)
        try:
            self._store = S3Store(
                options.bucket,
                config=config,  # type: ignore[arg-type]
                client_options={
                    "allow_http": options.endpoint.startswith("http://"),
                    "timeout": timeout,
                    "connect_timeout": timeout,
                },
                retry_config={"max_retries": 1, "retry_timeout": timeout},
            )
        except Exception as error:
            raise TierError("bad options", f"{_told(error)}; mend the s3 options") from None
        self._bounded = Bounded("s3", options.connections, options.timeout)
        self._facts = {"bucket": f"{options.bucket} at {options.endpoint or 'Amazon S3'}"}
        try:
            self._bounded.run(self._named, self._get, bytes(32), max(place.rank, 0))
        except TierError as error:
            if error.cause in ("wrong credentials", "no bucket"):
                self.close()
                raise TierError(
                    error.cause, f"{error}; mend bucket, endpoint or credentials"
                ) from None
            self._facts["server"] = f"not reached at start ({error})"

    def described(self) -> Mapping[str, str]:
        return self._facts

    def _path(self, key: bytes, rank: int) -> str:
        name = entry_name(key, rank, self._place.world)
        return f"{self._start}/{name[:2]}/{name}"

    def _named(self, function: Any, *arguments: Any) -> Any:
        """Call the client.

        Raises:
            TierError: It failed.
        """
        from obstore.exceptions import (
            BaseError,
            PermissionDeniedError,
            UnauthenticatedError,
        )

        try:
            return function(*arguments)
        except TierError:
            raise
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise TierError("wrong credentials", _told(error)) from None
        except (BaseError, OSError) as error:
            text = str(error)
            raise TierError(_cause(text), _told(error)) from None

    def put(self, items: Sequence[tuple[bytes, Any]]) -> list[str]:
        answers = [""] * len(items)
        calls = []
        places = []
        for i, (key, payload) in enumerate(items):
            given = memoryview(payload).cast("B")
            if len(given) > self.options.max_value:
                answers[i] = "too large"
                continue
            places.append((i, len(given)))
            calls.append((self._named, self._put, key, given))
        failures = []
        for (i, size), found in zip(places, self._bounded.run_all(calls), strict=True):
            if isinstance(found, TierError):
                answers[i] = found.cause
                # A store without room is still read.
                if found.cause != FULL:
                    failures.append(found)
            else:
                self._entries += 1
                self._used += size
        if failures and len(failures) == len(calls):
            raise failures[0]
        return answers

    def _put(self, key: bytes, payload: memoryview) -> None:
        from obstore.exceptions import AlreadyExistsError, GenericError

        path = self._path(key, self._place.rank)
        if self._conditional:
            try:
                self._store.put(path, payload, mode="create", use_multipart=False)
                return
            except AlreadyExistsError:
                return
            except GenericError as error:
                if "NotImplemented" not in str(error):
                    raise
                # The same key has the same bytes, so to replace them changes nothing.
                self._conditional = False
        self._store.put(path, payload, use_multipart=False)

    def get(self, keys: Sequence[bytes]) -> list[Any]:
        rank = self._place.rank
        found = self._bounded.run_all([(self._named, self._get, key, rank) for key in keys])
        failures = [one for one in found if isinstance(one, TierError)]
        if failures and len(failures) == len(found):
            raise failures[0]
        return [None if isinstance(one, TierError) else one for one in found]

    def _get(self, key: bytes, rank: int) -> memoryview | None:
        from obstore.exceptions import NotFoundError

        try:
            found = self._store.get(self._path(key, rank))
        except (NotFoundError, FileNotFoundError) as error:
            if "NoSuchBucket" in str(error):
                raise TierError("no bucket", _told(error)) from None
            return None
        if found.meta["size"] > self.options.max_value:
            return None
        return memoryview(found.bytes()).toreadonly()

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        ranks = self._place.ranks
        calls = [(self._named, self._has, key, rank) for key in keys for rank in ranks]
        found = self._bounded.run_all(calls)
        failures = [one for one in found if isinstance(one, TierError)]
        if failures and len(failures) == len(found):
            raise failures[0]
        there = [one is True for one in found]
        each = len(ranks)
        return [all(there[i * each : (i + 1) * each]) for i in range(len(keys))]

    def _has(self, key: bytes, rank: int) -> bool:
        from obstore.exceptions import NotFoundError

        try:
            size = self._store.head(self._path(key, rank))["size"]
            return 0 < size <= self.options.max_value
        except (NotFoundError, FileNotFoundError):
            return False

    def remove(self, keys: Sequence[bytes]) -> None:
        paths = [self._path(key, rank) for key in keys for rank in self._place.ranks]
        calls = [(self._named, self._remove, path) for path in paths]
        failures = [one for one in self._bounded.run_all(calls) if isinstance(one, TierError)]
        if failures:
            raise failures[0]

    def _remove(self, path: str) -> None:
        from obstore.exceptions import NotFoundError

        try:
            self._store.delete(path)
        except (NotFoundError, FileNotFoundError):
            return

    def usage(self) -> TierUsage:
        return TierUsage(self._entries, self._used, 0)

    def close(self) -> None:
        self._bounded.close()


def _credentials(path: str, profile: str) -> dict[str, str]:
    parsed = configparser.ConfigParser(interpolation=None)
    try:
        with Path(path).expanduser().open(encoding="utf-8") as file:
            parsed.read_string(file.read(1 << 16))
    except (OSError, ValueError, configparser.Error) as error:
        # A parser's message holds the line, which may be the secret.
        cause = getattr(error, "strerror", None) or "it is not of the form of AWS's files"
        raise TierError("no credentials", f"credentials {path} cannot be read: {cause}") from None
    if not parsed.has_section(profile):
        raise TierError("no credentials", f"credentials {path} has no section [{profile}]")
    found = {}
    for name in ("access_key_id", "secret_access_key", "session_token"):
        if value := parsed.get(profile, f"aws_{name}", fallback=""):
            found[name] = value
    if not {"access_key_id", "secret_access_key"} <= found.keys():
        raise TierError(
            "no credentials",
            f"section [{profile}] of credentials {path} lacks aws_access_key_id or "
            "aws_secret_access_key",
        )
    return found


def _told(error: BaseException) -> str:
    """What a client said that a user can use, one line."""
    text = str(error).strip()
    if not text:
        return type(error).__name__
    line = (
        text.splitlines()[0]
        .rpartition(" - ")[2]
        .removesuffix('<?xml version="1.0" encoding="UTF-8"?>')
    )
    code = _CODE.search(text)
    return f"{line[:300].rstrip(': ')}{f' ({code[1]})' if code else ''}"


def _cause(text: str) -> str:
    """A few words for what a client or a server said."""
    if "NoSuchBucket" in text:
        return "no bucket"
    if any(word in text for word in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNot")):
        return "wrong credentials"
    if "kind: Timeout" in text or "TimedOut" in text:
        return "too slow"
    if "kind: Connect" in text or "HTTP error" in text:
        return "unreachable"
    # The digits alone are in keys and ports too.
    if _NO_ROOM.search(text) or "InternalError" in text:
        return FULL
    return "refused"
