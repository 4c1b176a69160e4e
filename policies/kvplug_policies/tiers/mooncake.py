"""Mooncake store: one pool of the host memory of several machines."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

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

RETRY = 5.0
"""Seconds between two tries to join a store that is not reached."""

WRITING = 1.0
"""Seconds that a put waits for another client that is writing the same chunk."""

_FULL = (-200, -201)
"""Codes of a store without room: no segment has any, or none is mounted."""
_THERE = -705
_ABSENT = -704
_NO_ANSWER = -900


class Mooncake(Tier):
    """Stores payloads in the memory that every node of a Mooncake store contributes.

    The store evicts by itself. Each worker joins it as a node; the scheduler's process joins too,
    with no memory of its own, to ask what is there.
    """

    name = "mooncake"
    changes = "stores KV that leaves the engine's pool in a Mooncake store of several machines"
    shared = True
    durable = True

    class Options(TierOptions):
        """Options of ``mooncake``.

        Attributes:
            master: Address of the store's master.
            metadata: URL of the metadata service.
            address: This machine's address for the other nodes.
            segment: Bytes that each worker contributes.
            buffer: Bytes of each worker's staging memory.
            protocol: How bytes travel.
            devices: Network devices.
            timeout: Seconds that one call may take.
            connections: Calls of each worker at once.
            max_value: Bytes of a payload above which it is not stored.
        """

        master: str = Field(min_length=3, description="`host:port` of mooncake_master")
        metadata: str = Field(
            "P2PHANDSHAKE",
            min_length=3,
            description="metadata service, e.g. `http://host:port/metadata`; by default nodes "
            "ask each other",
        )
        address: str = Field(
            "",
            description="host name or address of this machine for other nodes; empty for its "
            "host name's",
        )
        segment: Size = Field(
            1 << 30, ge=0, description="bytes of host memory that each worker contributes"
        )
        buffer: Size = Field(
            256 << 20, ge=16 << 20, description="bytes of each worker's staging memory"
        )
        protocol: Literal["tcp", "rdma"] = Field("tcp", description="how bytes travel")
        devices: str = Field("", description="network devices, for `rdma`")
        timeout: float = Field(
            5.0, ge=0.01, le=600, description="seconds that one call may take before it is given up"
        )
        connections: int = Field(4, ge=1, le=64, description="calls of each worker at once")
        max_value: Size = Field(
            64 << 20, ge=1 << 10, le=1 << 30, description="bytes of the largest payload stored"
        )

        @model_validator(mode="after")
        def _devices_are_used(self) -> Mooncake.Options:
            if self.devices and self.protocol != "rdma":
                raise ValueError("devices needs protocol: rdma")
            return self

        @property
        def places(self) -> frozenset[str]:
            return frozenset({self.master})

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        require_package("mooncake", "mooncake")
        if ":" not in self.options.master:
            raise ValueError("master must be host:port")

    def open(self, place: TierPlace) -> None:
        self._place = place
        self._start = identity_name(place.identity)
        self._entries = self._used = 0
        self._store: Any = None
        self._joining = threading.Lock()
        self._again = 0.0
        self._facts: dict[str, str] = {}
        try:
            import mooncake.store  # noqa: F401
        except ImportError as error:
            raise TierError(
                "not installed",
                f"Mooncake's client does not load ({error}); on Debian: apt-get install "
                "libibverbs1 librdmacm1 libnuma1 liburing2 libcurl4",
            ) from None
        self._bounded = Bounded("mooncake", self.options.connections, self.options.timeout)
        try:
            self._bounded.run(self._joined)
        except TierError as error:
            self._facts["store"] = f"not joined at start ({error})"

    def _joined(self) -> Any:
        """The store; it is joined first where that is still to be done.

        Raises:
            TierError: It cannot be joined now.
        """
        if self._store is not None:
            return self._store
        with self._joining:
            if self._store is not None:
                return self._store
            if time.monotonic() < self._again:
                raise TierError("unreachable", "the store was not reached lately")
            from mooncake.store import MooncakeDistributedStore

            options = self.options
            host, _, port = options.master.rpartition(":")
            try:
                # The client itself waits for a master for minutes.
                socket.create_connection((host, int(port)), options.timeout).close()
            except (OSError, ValueError) as error:
                self._again = time.monotonic() + RETRY
                raise TierError("unreachable", f"master {options.master}: {error}") from None
            store = MooncakeDistributedStore()
            segment = options.segment if self._place.rank >= 0 else 0
            address = f"{options.address or socket.gethostname()}:{_free_port()}"
            code = store.setup(
                address,
                options.metadata,
                segment,
                options.buffer,
                options.protocol,
                options.devices,
                options.master,
            )
            if code:
                self._again = time.monotonic() + RETRY
                raise TierError("unreachable", f"setup of {address} answered {code}")
            self._facts = {
                "store": f"master {options.master}, joined as {address} over {options.protocol} "
                f"with {segment:,} bytes"
            }
            self._store = store
            return store

    def described(self) -> Mapping[str, str]:
        return self._facts

    def _name(self, key: bytes, rank: int) -> str:
        return f"{self._start}/{entry_name(key, rank, self._place.world)}"

    def put(self, items: Sequence[tuple[bytes, Any]]) -> list[str]:
        given = [(key, memoryview(payload).cast("B")) for key, payload in items]
        most = self.options.max_value
        calls = [(self._put, key, one) for key, one in given if len(one) <= most]
        found = iter(self._bounded.run_all(calls))
        answers, failures = [], []
        for _, one in given:
            if len(one) > most:
                answers.append("too large")
                continue
            answer = next(found)
            if isinstance(answer, TierError):
                failures.append(answer)
                answer = answer.cause
            elif not answer:
                self._entries += 1
                self._used += len(one)
            answers.append(answer)
        if failures and len(failures) == len(calls):
            raise failures[0]
        return answers

    def _put(self, key: bytes, payload: memoryview) -> str:
        store, name = self._joined(), self._name(key, self._place.rank)
        code = store.put(name, payload)
        if code in (0, _THERE):
            return "" if self._is_whole(store, name) else "being written"
        if code in _FULL:
            return "full"
        raise TierError("unreachable" if code == _NO_ANSWER else "refused", f"put answered {code}")

    def _is_whole(self, store: Any, name: str) -> bool:
        """Wait until the chunk can be read: a put succeeds at once where another client has begun
        to write the same one."""
        until, pause = time.monotonic() + WRITING, 0.0005
        # A call that was given up on may end after the store was closed, and a closed store crashes
        # whoever asks it.
        while self._store is store:
            if store.is_exist(name) == 1:
                return True
            if time.monotonic() > until:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        return False

    def get(self, keys: Sequence[bytes]) -> list[Any]:
        names = [self._name(key, self._place.rank) for key in keys]
        found = self._bounded.run_all([(self._get, name) for name in names])
        failures = [one for one in found if isinstance(one, TierError)]
        if failures and len(failures) == len(found):
            raise failures[0]
        return [None if isinstance(one, TierError) else one for one in found]

    def _get(self, name: str) -> memoryview | None:
        found = self._joined().get(name)
        return memoryview(found) if found else None

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        ranks = self._place.ranks
        names = [self._name(key, rank) for key in keys for rank in ranks]
        found = self._bounded.run(self._has, names) if names else []
        each = len(ranks)
        return [all(found[i * each : (i + 1) * each]) for i in range(len(keys))]

    def _has(self, names: list[str]) -> list[bool]:
        found = self._joined().batch_is_exist(names)
        if found and all(code < 0 and code != _ABSENT for code in found):
            raise TierError("unreachable", f"the store answered {found[0]}")
        return [code == 1 for code in found]

    def remove(self, keys: Sequence[bytes]) -> None:
        names = [self._name(key, rank) for key in keys for rank in self._place.ranks]
        if names:
            self._bounded.run(self._remove, names)

    def _remove(self, names: list[str]) -> None:
        # By force: who reads one meanwhile finds its checksum wrong, which is a miss.
        self._joined().batch_remove(names, True)

    def usage(self) -> TierUsage:
        return TierUsage(self._entries, self._used, 0)

    def close(self) -> None:
        self._bounded.close()
        store, self._store = self._store, None
        if store is not None:
            store.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
