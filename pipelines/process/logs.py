"""The log on standard error: each record one line of printable characters without credentials, and its traceback."""

import logging
import sys

from pipelines.process.redaction import redacted
from pspnet_core.errors import printable


class Printable(logging.Formatter):
    """Escapes what names and messages from outside may hold: a line break would forge a line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The record's line."""
        return super().formatMessage(record).replace("\n", "\\n")

    def format(self, record: logging.LogRecord) -> str:
        """The record's line, and the lines of its traceback."""
        return "\n".join(printable(redacted(line)) for line in super().format(record).split("\n"))


def log_to_stderr() -> None:
    """Show warnings of everything, unless somebody has set up a log before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Printable("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler])
