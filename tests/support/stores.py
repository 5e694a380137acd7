"""A store that counts what is read of it."""

import io
from pathlib import Path
from typing import BinaryIO, cast

from pipelines.process.retrying import Retries
from pipelines.storage.local import LocalStore


class CountingStore(LocalStore):
    """A local folder that notes the paths of what is opened, and how many bytes are read of that."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root), field="output", retries=Retries())
        self.opened: list[str] = []
        self.read_bytes = 0

    def open(self, path: str) -> BinaryIO:
        self.opened.append(path)
        store = self

        class Counted(io.FileIO):
            def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
                store.read_bytes += (count := cast(int, super().readinto(buffer)))
                return count

            def read(self, size: int | None = -1, /) -> bytes:
                store.read_bytes += len(data := cast(bytes, super().read(size)))
                return data

        return cast(BinaryIO, Counted(self.uri_of(path)))
