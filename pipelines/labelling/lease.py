"""Who is at work on an output, told to whoever comes next: one small object, which its holder renews and then deletes.

A courtesy: it saves work that would be done twice. What is labelled, once and exactly, does not depend on it: it may be
deleted at any time, and a holder that wakes after its lease was taken over does no harm.

Clocks of different machines are never compared. A lease that a waiting process has seen unchanged for longer than a
lease lives is anybody's; so is one whose holder, on the same machine, has ended.
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
from typing import Any

import psutil  # type: ignore[import-untyped]

from pipelines.label_table.schema import utc_now
from pipelines.process.background import ticking
from pipelines.storage import ObjectChanged, ObjectMissing, Store, TransientStorageError
from pspnet_core.errors import PspnetError

log = logging.getLogger(__name__)

TROUBLE = (PspnetError, OSError, psutil.Error)
"""What may go wrong with a lease, and concerns nothing else."""
BOOT = Path("/proc/sys/kernel/random/boot_id")
SAME_START_S = 2.0
"""Seconds by which two answers to when a process was started may differ."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Seconds: how long a lease lives without being renewed, how often it is, and how often others look."""

    life: float = 60.0
    renewal: float = 10.0
    look: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Holder:
    """What a lease says.

    Attributes:
        host, machine: its name; what tells it from others of the same name, and one container on it from the other.
        process, started: number, and seconds since the epoch.
        since: when it began to hold the lease, in ISO 8601.
        token: no other holder has it.
        renewals: how often the lease was renewed.
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
        """Whether it is known to be gone; of another machine nothing is known."""
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
        except psutil.AccessDenied:
            return False


UNKNOWN = Holder(host="a machine unknown", machine="", process=0, started=0.0, since="a time unknown", token="")


@contextlib.contextmanager
def hold_lease(store: Store, path: str, *, wait: bool, terms: Terms | None = None) -> Iterator[None]:
    """Hold the lease at ``path`` within the context, as far as that can be had. What goes wrong with it is logged, and
    does not concern the work.

    Args:
        wait: whether to wait while somebody else holds it; otherwise that is told, and work goes on beside them.
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
    def __init__(self, store: Store, path: str, terms: Terms) -> None:
        self.store, self.path, self.terms = store, path, terms
        self.own = Holder.here()
        self.held = self.waited = False

    def acquire(self, *, wait: bool) -> bool:
        """Whether the lease is held now."""
        try:
            self.held = self._acquire(wait=wait)
        except TROUBLE as error:
            log.warning("others cannot be told that this run is under way: %s", error)
        return self.held

    def _acquire(self, *, wait: bool) -> bool:
        seen, unchanged = "", time.monotonic()
        while True:
            holder, etag = self._asked_for()
            if holder.token == self.own.token:
                return True
            if etag != seen:
                seen, unchanged = etag, time.monotonic()
            if holder.has_ended() or time.monotonic() - unchanged > self.terms.life:
                if etag and self.store.put_if_match(self.path, _content(self.own), etag):
                    log.warning("taking over from a run that gives no sign of life any more (%s)", holder)
                    return True
                if not etag and not self.waited:  # nor is it that storage is away
                    log.warning("others cannot be told that this run is under way: %s cannot be written", self.path)
                    return False
            elif not wait:
                log.warning("another run is at work on the same (%s); some work will be done twice", holder)
                return False
            elif etag and not self.waited:
                self.waited = True
                log.warning("waiting for another run that is at work on the same (%s)", holder)
            time.sleep(self.terms.look)

    def _asked_for(self) -> tuple[Holder, str]:
        """Who holds the lease, which we do from now on if nobody did, and its version; "" where neither can be told."""
        try:
            if self.store.put_if_absent(self.path, _content(self.own)):
                return self.own, ""
            return self._found() or (UNKNOWN, "")  # between two requests it was renewed or released
        except TransientStorageError:
            if not self.waited:
                raise
            return UNKNOWN, ""  # an outage does not end the waiting

    def _found(self) -> tuple[Holder, str] | None:
        """Who holds the lease, and its version; None where it is gone, or changes at this very moment."""
        with contextlib.suppress(ObjectMissing, ObjectChanged):
            if found := self.store.stat(self.path):
                return _holder(self.store.read_if(self.path, found.etag)), found.etag
        return None

    def renew(self) -> None:
        """Show that its holder is alive."""
        if not self.held:
            return
        try:
            self.own = replace(self.own, renewals=self.own.renewals + 1)
            found = self._found()
            if found is None:  # somebody has deleted it
                self.store.put_if_absent(self.path, _content(self.own))
            elif self._is_ours(found[0]):
                self.store.put_if_match(self.path, _content(self.own), found[1])
        except TransientStorageError as error:
            log.warning("others may think that this run has ended: %s", error)
        except TROUBLE as error:
            self.held = False
            log.warning("others are not told any more that this run is under way: %s", error)

    def release(self) -> None:
        """Let the next one have it."""
        try:
            found = self._found() if self.held else None
            if found and self._is_ours(found[0]):
                self.store.delete(self.path)
        except TROUBLE as error:
            log.warning("the next run will wait up to %g s for this one: %s", self.terms.life, error)

    def _is_ours(self, holder: Holder) -> bool:
        """Whether nobody has taken over, which is told once."""
        if holder.token != self.own.token:
            self.held = False
            log.warning("another run has taken over (%s); some work will be done twice", holder)
        return self.held


def _content(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=2).encode()


def _holder(content: bytes) -> Holder:
    try:
        known: dict[str, Any] = json.loads(content)
        return Holder(**known)
    except (TypeError, ValueError):  # of another version, or damaged: it still counts, as long as it lives
        return UNKNOWN


def _machine() -> str:
    """What tells the processes of one running system, or of one container of it, from all others."""
    namespace = Path("/proc/self/ns/pid")
    if BOOT.is_file() and namespace.is_symlink():
        return f"{BOOT.read_text().strip()} {os.readlink(namespace)}"
    return socket.gethostname()
