"""Progress of a long run: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_INTERVAL_S = 10.0


class Progress:
    """Counts images towards a total, on standard error.

    Args:
        total: images in all.
        what: what is being done, such as ``labelling``.
    """

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what, self.done = total, what, 0
        self.start = self.shown = time.monotonic()
        on_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=what, unit="image", dynamic_ncols=True) if on_terminal else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        elif kind is None:
            self._line()

    def advance(self, images: int) -> None:
        """Count some more images."""
        self.done += images
        if self.bar is not None:
            self.bar.update(images)
        elif time.monotonic() - self.shown >= LINE_INTERVAL_S:
            self._line()

    def _line(self) -> None:
        self.shown = time.monotonic()
        rate = self.done / max(1e-9, self.shown - self.start)
        print(f"{self.what}: {self.done}/{self.total} images, {rate:.1f} images/s", file=sys.stderr, flush=True)
