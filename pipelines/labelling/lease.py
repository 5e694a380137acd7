"""The lease on an output: one small object that names the run at work, which renews it and deletes it at its end.

The lease only saves two runs from doing the same work. Exactly-once labelling does not depend on it: anyone may delete
it at any time, and a holder that wakes after another run took the lease over does no harm.

Clocks of different machines are never compared. A waiting run takes over a lease that it has seen unchanged for longer
than a lease lives, or whose holder ran on the same machine and has ended.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from pipelines.label_table.schema import utc_now
from pipelines.process.background import ticking
from pipelines.process.reading_back import read_back
from pipelines.storage import ObjectChanged, ObjectMissing, Store, TransientStorageError
from pspnet_core.errors import PspnetError

log = logging.getLogger(__name__)

TROUBLE = (PspnetError, OSError, psutil.Error)
"""Errors with the lease, which are logged and do not stop the work."""
BOOT = Path("/proc/sys/kernel/random/boot_id")
SAME_START_S = 2.0
"""Tolerance in seconds when two readings of a process's start time are compared."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Seconds: how long a lease lives unrenewed, how often its holder renews it, and how often a waiting run looks."""

    life: float = 60.0
    renewal: float = 10.0
    look: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The content of a lease: the process that holds it.

    Attributes:
        host, machine: host name; an id that differs between machines of one name and between containers of a machine.
        process, started: process id; its start in seconds since the epoch.
        since: when it took the lease, in ISO 8601.
        token: unique to this holder.
        renewals: how often it has renewed the lease.
    """

    host: str
    machine: str
    process: int
    started: float
    since: str
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    renewals: int = 0

    @classmethod
    def here(cls) -> "Holder":
        """The calling process."""
        own = psutil.Process()
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            process=os.getpid(),
            started=own.create_time(),
            since=f"{utc_now():%Y-%m-%dT%H:%M:%SZ}",
        )

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"

    def has_ended(self) -> bool:
        """Whether the process is certainly gone; False for one of another machine, which cannot be asked."""
        if self.machine != _machine():
            return False
        try:
            if not psutil.pid_exists(self.process):
                return True
            found = psutil.Process(self.process)
            same = abs(found.create_time() - self.started) < SAME_START_S
            return not same or found.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except (psutil.AccessDenied, OverflowError):  # a number that no process can have
            return False


UNKNOWN = Holder(host="a machine unknown", machine="", process=0, started=0.0, since="a time unknown", token="")


@contextlib.contextmanager
def hold_lease(store: Store, path: str, *, wait: bool, terms: Terms | None = None) -> Iterator[None]:
    """Hold the lease at ``path`` within the context. Errors with the lease are logged, and the work goes on without it.

    Args:
        wait: whether to wait while another run holds it; otherwise log a warning and work beside that run.
    """
    terms = terms or Terms()
    lease = _Lease(store, path, terms)
    if not lease.acquire(wait=wait):
        yield
        return
    try:
        with ticking(terms.renewal, lease.renew):
            yield
    finally:
        lease.release()


class _Lease:
    """This run's side of the lease."""

    def __init__(self, store: Store, path: str, terms: Terms) -> None:
        self.store, self.path, self.terms = store, path, terms
        self.own = Holder.here()
        self.held = self.waited = False

    def acquire(self, *, wait: bool) -> bool:
        """Take the lease; False where this run works without it."""
        try:
            self.held = self._acquire(wait=wait)
        except TROUBLE as error:
            log.warning("no lease: another run will not know of this one (%s)", error)
        return self.held

    def _acquire(self, *, wait: bool) -> bool:
        seen, unchanged = "", time.monotonic()
        while True:
            holder, etag = self._take_or_look()
            if holder.token == self.own.token:
                return True
            if etag != seen:
                seen, unchanged = etag, time.monotonic()
            if holder.has_ended() or time.monotonic() - unchanged > self.terms.life:
                if etag and self.store.put_if_match(self.path, _content(self.own), etag):
                    log.warning("taking over the lease of a run that has ended or hangs (%s)", holder)
                    return True
                if not etag and not self.waited:  # nor is it that storage is away
                    log.warning("no lease: another run will not know of this one (%s cannot be written)", self.path)
                    return False
            elif not wait:
                log.warning("another run labels into the same output (%s); some work will be done twice", holder)
                return False
            elif etag and not self.waited:
                self.waited = True
                log.warning("waiting for another run that labels into the same output (%s)", holder)
            time.sleep(self.terms.look)

    def _take_or_look(self) -> tuple[Holder, str]:
        """Take a free lease. Returns its holder and the object's ETag: ``UNKNOWN`` and "" if it changes meanwhile."""
        try:
            if self.store.put_if_absent(self.path, _content(self.own)):
                return self.own, ""
            return self._found() or (UNKNOWN, "")  # between two requests it was renewed or released
        except TransientStorageError:
            if not self.waited:
                raise
            return UNKNOWN, ""  # an outage does not end the waiting

    def _found(self) -> tuple[Holder, str] | None:
        """Read the lease: its holder and the object's ETag; None where it is gone or just changes."""
        with contextlib.suppress(ObjectMissing, ObjectChanged):
            if found := self.store.stat(self.path):
                return _holder(self.store.read_if(self.path, found.etag)), found.etag
        return None

    def renew(self) -> None:
        """Renew the lease, unless another run has taken it over."""
        if not self.held:
            return
        try:
            self.own = replace(self.own, renewals=self.own.renewals + 1)
            found = self._found()
            if found is None:  # it was deleted
                self.store.put_if_absent(self.path, _content(self.own))
            elif self._is_ours(found[0]):
                self.store.put_if_match(self.path, _content(self.own), found[1])
        except TransientStorageError as error:
            log.warning("the lease could not be renewed; another run may take it over: %s", error)
        except TROUBLE as error:
            self.held = False
            log.warning("the lease is lost; another run may start beside this one: %s", error)

    def release(self) -> None:
        """Delete the lease, unless another run has taken it over."""
        try:
            found = self._found() if self.held else None
            if found and self._is_ours(found[0]):
                self.store.delete(self.path)
        except TROUBLE as error:
            log.warning("the next run will wait up to %g s for this one: %s", self.terms.life, error)

    def _is_ours(self, holder: Holder) -> bool:
        """Whether this run still holds the lease; a takeover is logged once."""
        if holder.token != self.own.token:
            self.held = False
            log.warning("another run has taken over (%s); some work will be done twice", holder)
        return self.held


def _content(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=2).encode()


def _holder(content: bytes) -> Holder:
    try:
        return read_back(Holder, content)
    except ValueError:  # written by another version, or damaged: it counts until it has lived out its time
        return UNKNOWN


def _machine() -> str:
    """An id of the running system, or of the container, whose process ids this process sees."""
    namespace = Path("/proc/self/ns/pid")
    if BOOT.is_file() and namespace.is_symlink():
        return f"{BOOT.read_text().strip()} {os.readlink(namespace)}"
    return socket.gethostname()
