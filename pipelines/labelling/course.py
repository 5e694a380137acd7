"""How a plan's chunks turn out, and when that ends the run."""

from pipelines.labelling.report.totals import Totals

ENOUGH_TO_JUDGE = 100
"""Images after which ``--max-errors`` is first looked at."""
GIVEN_UP_IN_A_ROW = 5
"""Chunks in a row that keep ending the processes that work on them, after which the machine is to blame."""


class Course:
    """How the chunks of a plan have turned out so far.

    Attributes:
        failure: why the run is to end; empty as long as it goes on.
    """

    def __init__(self, max_errors: float) -> None:
        self.max_errors = max_errors
        self.totals, self.failure = Totals(), ""
        self.given_up = 0  # chunks in a row

    def add(self, totals: Totals) -> None:
        """Count one more chunk."""
        self.totals += totals
        if totals.given_up or totals.done:  # else another run has written it, or it was not begun
            self.given_up = self.given_up + 1 if totals.given_up else 0
        self.failure = self.failure or self._broken_machine() or self._too_many_errors()

    def _broken_machine(self) -> str:
        if self.given_up < GIVEN_UP_IN_A_ROW:
            return ""
        return (
            f"{self.given_up} chunks in a row ended the processes that work on them, again and again, which speaks of "
            "this machine or of the model: look for the reason in the workers' logs (too little memory? fewer "
            "--workers leave more for each)"
        )

    def _too_many_errors(self) -> str:
        errors, done = self.totals.errors, self.totals.done
        if done < ENOUGH_TO_JUDGE or errors <= self.max_errors * done:
            return ""
        reasons = ", ".join(f"{kind} {count}" for kind, count in self.totals.kinds.most_common(5))
        limit = f"--max-errors {self.max_errors:g}"
        return f"{errors} of {done} images cannot be labelled ({reasons}), more than {limit} allows"
