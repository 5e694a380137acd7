"""What a listing leaves out: counted, and told in a few lines, so that nothing vanishes without a word."""

import logging
import threading
from collections import Counter

from pspnet_core.errors import as_image_error, one_line

log = logging.getLogger(__name__)
LONGEST_SUFFIX = 12
"""Characters of a suffix; of a longer one it is not likely that it names a format."""
MOST_SUFFIXES = 100
"""Different suffixes that are counted by themselves."""
OTHER = "other"


class Omissions:
    """What one listing has left out; may be told of it by many threads.

    Attributes:
        damaged: URIs of the files with many images that could not be listed in full.
        unreadable: how many names are no text, and how many folders cannot be listed.
        suffixes: how many objects are of another format, by the ends of their names.
    """

    def __init__(self) -> None:
        self.damaged = set[str]()
        self.unreadable = 0
        self.suffixes = Counter[str]()
        self._lock = threading.Lock()

    def add_unreadable(self, uri: str, error: Exception) -> None:
        """Count a name or folder; the first is logged."""
        with self._lock:
            self.unreadable += 1
            first = self.unreadable == 1
        if first:
            log.warning("%s is left out: %s", one_line(uri), as_image_error(error).message)

    def add_other_format(self, key: str) -> None:
        """Count an object. Called by one thread."""
        name = key.rpartition("/")[2].lower()
        suffix = f".{name.rpartition('.')[2]}" if "." in name else "none"
        known = suffix in self.suffixes or (len(suffix) <= LONGEST_SUFFIX and len(self.suffixes) < MOST_SUFFIXES)
        self.suffixes[one_line(suffix) if known else OTHER] += 1

    def tell(self) -> None:
        """Log the numbers."""
        if self.unreadable > 1:
            log.warning("%d names and folders are left out because they cannot be read", self.unreadable)
        if self.suffixes:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in self.suffixes.most_common())
            log.info("left out for the ends of their names: %s", kinds)

    def counts(self) -> dict[str, object]:
        """The numbers for the result line."""
        return {
            "damaged": len(self.damaged),
            "unreadable": self.unreadable,
            "other_formats": dict(self.suffixes.most_common()),
        }
