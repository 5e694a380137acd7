"""Repeat what did not answer: how often, for how long, at which pace, and what the log says of an outage.

Object storage, MLflow, training data, checkpoints and metrics all repeat their calls by a ``Retries``.
"""

import logging
import math
import random
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import tenacity

from pipelines.process.redaction import first_line

log = logging.getLogger(__name__)
T = TypeVar("T")
MayPass = Callable[[BaseException], bool]
"""Whether another attempt may go better after this error."""


class Outage:
    """From the first call that fails to the next that succeeds, whichever threads make them; the log says both.

    Args:
        what: what may not answer, such as ``storage``.
        plan: what happens until it does, such as ``training waits``.
    """

    def __init__(self, what: str, plan: str) -> None:
        self.what, self.plan = what, plan
        self._since = math.inf
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """How long it has lasted; 0 when there is none."""
        return max(0.0, time.monotonic() - self._since)

    def begin(self, error: BaseException) -> None:
        """A call has failed."""
        with self._lock:
            if self._since == math.inf:
                self._since = time.monotonic()
                log.warning("%s does not answer (%s); %s", self.what, first_line(error), self.plan)

    def end(self) -> None:
        """A call has succeeded."""
        with self._lock:
            if self._since < math.inf:
                log.warning("%s answers again after %.0f s", self.what, self.seconds)
                self._since = math.inf


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How patiently a call is repeated; the defaults give up after 5 attempts and 15 to 19 s of waiting.

    Attributes:
        attempts: calls in all, the first one included; 0 for as many as ``seconds`` allow.
        seconds: the last attempt begins after as many, counted from the first one, or from the beginning of the outage.
        first_wait: seconds before the second attempt; each later wait is twice as long.
        longest_wait: upper bound of one wait, in seconds.
        jitter: up to this many seconds are added to a wait, so that many workers do not return together.
    """

    attempts: int = 5
    seconds: float = math.inf
    first_wait: float = 1.0
    longest_wait: float = 8.0
    jitter: float = 1.0

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row, at least one."""
        growing = self.first_wait * 2.0 ** min(failures - 1, 64)
        return min(self.longest_wait, growing) + random.uniform(0, self.jitter)

    def call(
        self,
        action: Callable[[], T],
        may_pass: MayPass,
        *,
        done: int = 0,
        outage: Outage | None = None,
        given_up: Callable[[], bool] = bool,
    ) -> T:
        """``action()``, which must bear being repeated; raises what its last attempt raised.

        Args:
            done: attempts that were made before.
            outage: begins with a failure before another attempt, and ends with a success.
            given_up: whether no other attempt is wanted, asked after each failure.
        """
        result = tenacity.Retrying(**self._options(may_pass, done, outage, given_up))(action)
        if outage:
            outage.end()
        return result

    async def call_async(self, action: Callable[[], Awaitable[T]], may_pass: MayPass) -> T:
        """``await action()``, as ``call`` does it."""
        return await tenacity.AsyncRetrying(**self._options(may_pass, 0, None, bool))(action)

    def _options(
        self, may_pass: MayPass, done: int, outage: Outage | None, given_up: Callable[[], bool]
    ) -> dict[str, Any]:
        """Arguments of ``tenacity.Retrying`` and its kin."""

        def lasted(state: tenacity.RetryCallState) -> float:
            return max(state.seconds_since_start or 0.0, outage.seconds if outage else 0.0)

        def stop(state: tenacity.RetryCallState) -> bool:
            if self.attempts and state.attempt_number >= self.attempts - done:
                return True
            return lasted(state) >= self.seconds or given_up()

        def tell(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if outage and error:
                outage.begin(error)

        return {
            "stop": stop,
            "wait": lambda state: min(self.pause(state.attempt_number), max(0.0, self.seconds - lasted(state))),
            "retry": tenacity.retry_if_exception(may_pass),
            "before_sleep": tell,
            "reraise": True,
        }
