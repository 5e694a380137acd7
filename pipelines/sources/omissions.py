"""What a listing leaves out: counted, and told in a few lines, so that nothing vanishes without a word."""

import logging
import threading
from collections import Counter

from pspnet_core.errors import ConfigError, as_image_error, one_line

log = logging.getLogger(__name__)
LONGEST_SUFFIX = 12
"""Characters of a suffix; of a longer one it is not likely that it names a format."""
MOST_SUFFIXES = 100
"""Different suffixes that are counted by themselves."""
OTHER = "other"


class Omissions:
    """What one listing has left out. Safe to use in many threads.

    Attributes:
        files: how many files with many images could not be listed in full.
        names: how many names are no text, and how many folders cannot be listed.
        suffixes: how many objects and members are of another format, by the ends of their names.
        first: what was wrong with the first such file.
    """

    def __init__(self) -> None:
        self.files, self.names = 0, 0
        self.suffixes = Counter[str]()
        self.first: Exception | None = None
        self._lock = threading.Lock()

    def add_file(self, error: Exception) -> None:
        """Count a file with many images."""
        with self._lock:
            self.files += 1
            self.first = self.first or error

    def add_name(self, uri: str, error: Exception) -> None:
        """Count a name or folder; the first is logged."""
        with self._lock:
            self.names += 1
            first = self.names == 1
        if first:
            why = error.remedy if isinstance(error, ConfigError) else as_image_error(error).message
            log.warning("%s is left out: %s", one_line(uri), why)

    def add_format(self, name: str) -> None:
        """Count an object or member of another format."""
        stem, dot, end = name.rpartition("/")[2].lower().rpartition(".")
        suffix = f".{end}" if dot and stem else "none"
        with self._lock:
            known = suffix in self.suffixes or (len(suffix) <= LONGEST_SUFFIX and len(self.suffixes) < MOST_SUFFIXES)
            self.suffixes[one_line(suffix) if known else OTHER] += 1

    def tell(self) -> None:
        """Log the numbers."""
        if self.names > 1:
            log.warning("%d names and folders are left out because they cannot be read", self.names)
        if self.suffixes:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in self.suffixes.most_common())
            log.info("left out for the ends of their names: %s", kinds)

    def counts(self) -> dict[str, object]:
        """The numbers for the result line."""
        return {"damaged": self.files + self.names, "left_out": dict(self.suffixes.most_common())}
