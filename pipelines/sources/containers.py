"""Files that hold many images: an image's URI is ``<file>/<member>``, its etag and its time are the file's.

A row of a plan, and a row of the label table that is to be retried, name file and member and nothing else. ``read``
finds the member's place in the file anew, and keeps it in memory while the file is in use: a stored position would be
one more thing that may be wrong, and retried rows would not have it.
"""

import functools
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from pipelines.sources import base
from pipelines.sources.base import DENIED, ReadResult, Row, explained, place_of, rows_of, too_large
from pipelines.sources.inputs import FIELD, Inputs
from pipelines.storage import (
    ObjectArchived,
    ObjectChanged,
    ObjectDenied,
    ObjectError,
    ObjectMissing,
    Store,
    StoredObject,
)
from pspnet_core.errors import ConfigError
from pspnet_core.threads import map_ahead

log = logging.getLogger(__name__)
FILES_AHEAD = 8
"""Files that are looked through at the same time; their rows wait in memory for their turn."""

Look = Callable[[StoredObject], Iterable[Row]]
"""A file -> a row for each of its images. Raises ObjectError when the file cannot be had."""

Take = Callable[[Store, str, str, Sequence[str]], Mapping[str, ReadResult]]
"""(store, path, etag, members) -> each member's bytes or error. Raises ObjectError when the file cannot be had."""


def members_of(inputs: Inputs, suffixes: Collection[str], look: Look) -> Iterator[Row]:
    """The rows of all files that are new enough, file by file; several are looked through at the same time.

    A file that cannot be had is logged, left out and among ``inputs.damaged``.

    Raises:
        ConfigError: the permissions allow none of the files to be read.
    """
    files = (item for item in inputs.objects(suffixes) if inputs.keeps(item.modified))
    denied: ObjectDenied | None = None
    readable = False
    with ThreadPoolExecutor(FILES_AHEAD) as pool:
        for found in map_ahead(pool, lambda item: _looked_through(item, look, inputs), files, depth=FILES_AHEAD):
            if isinstance(found, ObjectDenied) and not isinstance(found, ObjectArchived):
                denied = denied or found
            else:
                readable = True
            if not isinstance(found, ObjectError):
                yield from found
    if denied and not readable:
        raise ConfigError(FIELD, inputs, f"none of the files there may be read: grant access; {denied.message}")


def _looked_through(item: StoredObject, look: Look, inputs: Inputs) -> Iterable[Row] | ObjectError:
    try:
        return look(item)
    except ObjectError as error:
        log.warning("%s; its images are left to the next run", error.message)
        inputs.damaged.append(item.uri)
        return error


def read_members(rows: pa.Table, suffixes: Collection[str], take: Take) -> list[ReadResult]:
    """As ``Source.read``, file by file; what is read of a file that turns out to have changed is thrown away."""
    results: dict[int, ReadResult] = {}
    wanted: dict[tuple[Store, str, str], list[tuple[int, str]]] = defaultdict(list)
    ends = re.compile(f"[^/](?:{'|'.join(map(re.escape, suffixes))})(?=/)", re.IGNORECASE)
    etag_of = functools.cache(_etag_now)
    for index, row in enumerate(rows_of(rows)):
        if row.bytes > base.MAX_BYTES:
            results[index] = too_large(row.bytes)
        else:
            store, path = _file_of(row, ends, etag_of)
            wanted[store, path, row.etag].append((index, row.key[len(path) + 1 :]))
    for (store, path, etag), places in wanted.items():
        found = _read_file(store, path, etag, [member for _, member in places], take)
        results |= {index: found[member] for index, member in places}
    return [results[index] for index in range(len(rows))]


def _file_of(row: Row, ends: re.Pattern[str], etag_of: Callable[[Store, str], str]) -> tuple[Store, str]:
    """The file in a row's key, whose name ``ends`` finds; the etag tells it from folders that are named like files."""
    store, key = place_of(row.uri, row.key)
    paths = [key[: match.end()] for match in ends.finditer(key)]
    if len(paths) > 1:
        here = [path for path in paths if etag_of(store, path)]
        same = [path for path in here if etag_of(store, path) == row.etag]
        paths = same or here or paths[-1:]
    return store, paths[0]


def _etag_now(store: Store, path: str) -> str:
    """The etag of a file; empty where there is none, ``DENIED`` where it may not be looked at."""
    try:
        item = store.look_up(path)
    except ObjectDenied:
        return DENIED
    return item.etag if item else ""


def _read_file(store: Store, path: str, etag: str, members: Sequence[str], take: Take) -> Mapping[str, ReadResult]:
    """The members' bytes, all of them from the version ``etag``."""
    try:
        check_unchanged(store, path, etag)
        found = take(store, path, etag, members)
        check_unchanged(store, path, etag)
        return found
    except ObjectMissing as error:
        # Asked for in this way, a store also notices that the whole folder is not mounted on this machine.
        (answer,) = store.read_many([(path, etag)])
        return dict.fromkeys(members, explained(answer if isinstance(answer, ObjectError) else error))
    except ObjectError as error:
        return dict.fromkeys(members, explained(error))


def check_unchanged(store: Store, path: str, etag: str) -> None:
    """Raise ObjectMissing or ObjectChanged unless a file is there in the version ``etag``."""
    item = store.look_up(path)
    if item is None:
        raise ObjectMissing(store.uri_of(path), f"{store.uri_of(path)} is not there any more")
    if item.etag != etag:
        raise ObjectChanged(store.uri_of(path))
