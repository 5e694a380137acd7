"""New files of a local folder: written aside and brought to disk, then linked, or moved, to their names.

A link either makes the name or finds it taken, so two writers cannot both win and no reader sees half a file. What a
killed writer leaves aside is swept later. A writer holds a lock on its file, which the system lets go of with its
process: age alone would not tell, as clocks are put forward.
"""

import contextlib
import errno
import fcntl
import os
import re
import time
import uuid
from collections.abc import Iterator
from typing import BinaryIO

from pipelines.storage.base import TransientStorageError

_STALE_SECONDS = 24 * 3600
_STAGED = re.compile("[0-9a-f]{32}")


@contextlib.contextmanager
def staged(folder: str, data: bytes) -> Iterator[str]:
    """``data`` in a new file below ``folder``, which is made; on disk, and gone when the context is left."""
    os.makedirs(folder, exist_ok=True)
    location = f"{folder}/{uuid.uuid4().hex}"
    try:
        with open(location, "xb") as file:
            _lock_now(file)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            yield location
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(location)


@contextlib.contextmanager
def one_at_a_time(folder: str) -> Iterator[None]:
    """Hold a lock below ``folder``, which is made; the system lets go of it when its holder dies."""
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/replace.lock", "rb", opener=_open_lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            raise PermissionError(errno.EACCES, "another user made replace.lock below it") from error
        yield


def _open_lock(location: str, flags: int) -> int:
    """Open the file of a lock, which another user may have made."""
    try:
        return os.open(location, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        return os.open(location, flags)


def sweep(folder: str) -> None:
    """Delete what writers that were killed long ago have left."""
    oldest = time.time() - _STALE_SECONDS
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError, PermissionError):  # another process sweeps, or another user's
                is_staged = _STAGED.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
                if is_staged and entry.stat().st_mtime < oldest:
                    _delete_abandoned(entry.path)


def _delete_abandoned(location: str) -> None:
    with open(location, "r+b") as file:  # over NFS a lock is of a file that is open for writing
        if _lock_now(file):
            os.unlink(location)


def _lock_now(file: BinaryIO) -> bool:
    """Lock a file, if its file system can; False where another process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    return True


def link(source: str, target: str) -> bool:
    """Link a staged file to its name, in whose folder others may be at work; False where the name is taken.

    Raises:
        TransientStorageError: the staged file is gone.
    """
    while True:
        with contextlib.suppress(FileNotFoundError):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            try:
                os.link(source, target)
            except FileExistsError:
                return False
            break
        check_staged(source)
    sync_folder(os.path.dirname(target))
    return True


def move(source: str, target: str) -> bool:
    """Move a staged file to its name, whatever is there; False where the folder has gone.

    Raises:
        TransientStorageError: the staged file is gone.
    """
    try:
        os.replace(source, target)
    except FileNotFoundError:
        check_staged(source)
        return False
    sync_folder(os.path.dirname(target))
    return True


def check_staged(location: str) -> None:
    """Raise TransientStorageError where a staged file is gone; it may be written again."""
    if not os.path.exists(location):
        raise TransientStorageError(f"{location} was deleted while it was in use: leave its folder alone")


def sync_folder(folder: str) -> None:
    """Bring a new name to disk: without it a power cut may lose a file that was reported as written."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
