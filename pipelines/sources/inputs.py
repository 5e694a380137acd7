"""What ``--input`` names: folders, globs and single objects, walked in parallel as one stream of objects."""

import contextlib
import datetime
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TypeVar

from fsspec.utils import glob_translate

from pipelines.label_table.schema import TABLES
from pipelines.sources.dates import with_date
from pipelines.sources.omissions import Omissions
from pipelines.storage import THREADS, Store, StoredObject, open_store
from pipelines.storage.base import LeftOut, is_hidden, split_scheme
from pspnet_core.errors import ConfigError
from pspnet_core.threads import map_ahead

FIELD = "input"
T = TypeVar("T")
SLICE = 4096
"""Objects, or images of a file, that one stream of a listing runs ahead of what is taken from it."""

MOST_EXPANDED = 10_000
"""Names that ranges in braces may stand for."""

_RANGE = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")
_WILD = re.compile(r"[*?]|\[[^\]]")


@dataclass(frozen=True, kw_only=True)
class Input:
    """One folder, glob or object.

    Attributes:
        root: URI of the folder that keys are relative to; that of the object itself where it is one.
        pattern: glob relative to ``root``; whatever matches is taken, and what lies below it. Empty for everything.
    """

    root: str
    pattern: str = ""

    @classmethod
    def parse(cls, text: str) -> "Input":
        """A folder, glob or object as a user writes it; ConfigError when it is none."""
        scheme, rest = split_scheme(text)
        if scheme == "file" and os.path.exists(os.path.expanduser(rest)):  # its name may look like a glob
            return cls(root=open_store(text, field=FIELD).root)
        parts = rest.split("/")
        fixed = next((number for number, part in enumerate(parts) if _WILD.search(part)), len(parts))
        folder, pattern = "/".join(parts[:fixed]), "/".join(parts[fixed:]).rstrip("/")
        if pattern and not folder:
            if scheme != "file":
                raise ConfigError(FIELD, text, "wildcards may stand only after the name of the bucket; write that out")
            folder = "/" if fixed else "."
        _check_glob(FIELD, pattern)
        return cls(root=open_store(text[: len(text) - len(rest)] + folder, field=FIELD).root, pattern=pattern)

    @property
    def uri(self) -> str:
        """The input in full, as plans and run records name it."""
        return f"{self.root.rstrip('/')}/{self.pattern}" if self.pattern else self.root

    @property
    def store(self) -> Store:
        """The store of its root."""
        return open_store(self.root, field=FIELD)

    def selects(self, uri: str) -> bool:
        """Whether a listing of this input holds the object."""
        top = self.root.rstrip("/") + "/"
        if not uri.startswith(top):
            return uri == self.root
        below = uri[len(top) :]
        return not is_hidden(below) and (not self.pattern or self._matches(below))

    def parts(self, suffixes: Collection[str], left_out: LeftOut) -> Iterator[Iterator[StoredObject]]:
        """The objects, in streams that may be drawn from at the same time.

        Args:
            suffixes: names of one object, which the input itself may be.
            left_out: as for ``Store.list_in_parts``.
        """
        if not self.pattern and self.root.lower().endswith(tuple(suffixes)):
            folder, _, name = self.root.rpartition("/")
            found = open_store(folder or "/", field=FIELD).stat(name)
            if found is not None:
                yield iter([found])
                return
        for part in self.store.list_in_parts(left_out):
            yield filter(lambda item: self._matches(item.key), part) if self.pattern else part

    def _matches(self, key: str) -> bool:
        return _compiled(self.pattern).match(key) is not None

    def overlaps(self, other: "Input") -> bool:
        """Whether the two may hold the same object."""
        first, second = self.root.rstrip("/") + "/", other.root.rstrip("/") + "/"
        return first.startswith(second) or second.startswith(first)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that one run labels.

    Attributes:
        places: the folders, globs and objects; what an earlier one holds is left out of the later ones.
        since: only what was modified then or later counts; None for everything.
        exclude: globs relative to the root of each place; what matches is left out, and what lies below it.
        allow: URIs of what manifests may name besides what lies with them.
        output: URI of the run's output, whose tables are no input.
        omissions: what a listing leaves out.
    """

    places: tuple[Input, ...]
    since: datetime.datetime | None = None
    exclude: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    output: str = ""
    omissions: Omissions = field(default_factory=Omissions, compare=False)

    @classmethod
    def of(
        cls,
        text: str,
        *,
        date: datetime.date,
        since: datetime.datetime | None = None,
        exclude: tuple[str, ...] = (),
        allow: tuple[str, ...] = (),
    ) -> "Inputs":
        """What ``--input`` says: places with commas between them, or a list as JSON or YAML gives it.

        Args:
            text: may hold the templates of ``with_date``.
            date: the run's.
            since, exclude, allow: as the attributes.

        Raises:
            ConfigError: an input or a glob is empty or malformed.
        """
        named = (each for part in split_inputs(text) for each in expanded(part))
        return cls(
            places=tuple(Input.parse(with_date(each, date, field=FIELD)) for each in named),
            since=since,
            exclude=tuple(map(_excluded, exclude)),
            allow=tuple(map(_allowed, allow)),
        )

    @property
    def uris(self) -> tuple[str, ...]:
        """Every input in full."""
        return tuple(place.uri for place in self.places)

    def __str__(self) -> str:
        return ",".join(self.uris)

    def keeps(self, modified: datetime.datetime | None) -> bool:
        """Whether something of this age counts; where the storage tells no time, it does."""
        return self.since is None or modified is None or modified >= self.since

    def new_objects(self, suffixes: Collection[str]) -> Iterator[StoredObject]:
        """As ``objects``, those that are new enough."""
        return (item for item in self.objects(suffixes) if self.keeps(item.modified))

    def objects(self, suffixes: Collection[str]) -> Iterator[StoredObject]:
        """The objects of all inputs, of any age; each object comes once. Inputs and their parts are listed at the
        same time.

        Args:
            suffixes: ends of names, in lower case.

        Raises:
            ConfigError: no such bucket or folder, or it may not be listed.
            TransientStorageError: storage does not answer.
        """
        endings = tuple(suffixes)
        with ThreadPoolExecutor(THREADS) as pool:
            numbers = range(len(self.places))
            parts = map_ahead(pool, lambda number: self._parts(number, suffixes), numbers, depth=THREADS)
            for item in interleaved(itertools.chain.from_iterable(parts)):
                if item.key.lower().endswith(endings):
                    yield item
                else:
                    self.omissions.add_format(item.key)

    def _parts(self, number: int, suffixes: Collection[str]) -> list[Iterator[StoredObject]]:
        place = self.places[number]
        earlier = [other for other in self.places[:number] if other.overlaps(place)]
        tables = tuple(f"{self.output.rstrip('/')}/{folder}" for folder in TABLES) if self.output else ()

        def is_wanted(item: StoredObject) -> bool:
            return not (
                item.uri.startswith(tables)
                or self._excludes(place, item.uri)
                or any(other.selects(item.uri) and not self._excludes(other, item.uri) for other in earlier)
            )

        return [filter(is_wanted, part) for part in place.parts(suffixes, self.omissions.add_name)]

    def _excludes(self, place: Input, uri: str) -> bool:
        """Whether ``exclude`` leaves out something of one of the places."""
        key = uri[len(place.root.rstrip("/")) + 1 :]
        return any(_compiled(pattern).match(key) for pattern in self.exclude)


def _allowed(uri: str) -> str:
    if _WILD.search(uri):
        raise ConfigError("allow", uri, "give a folder, bucket or host without wildcards")
    return open_store(uri, field="allow").root


def _excluded(pattern: str) -> str:
    """A glob of ``--exclude`` in the form of keys; ConfigError when it can match none."""
    relative = pattern.removeprefix("./").rstrip("/")
    if not relative or relative.startswith(("/", "~", "../")) or "://" in relative:
        raise ConfigError("exclude", pattern, "give a glob relative to the input, such as thumbs or */thumbs/*.jpg")
    _check_glob("exclude", relative)
    return relative


def _check_glob(field: str, pattern: str) -> None:
    try:
        glob_translate(pattern)
    except ValueError as error:
        raise ConfigError(field, pattern, "** stands for whole folders: put it between slashes") from error


def expanded(text: str) -> list[str]:
    """The texts that one with ranges of numbers in braces stands for, as a shell expands them: ``{000..012}``.

    Raises:
        ConfigError: more than ``MOST_EXPANDED``.
    """
    ranges = [_numbers(*match.groups()) for match in _RANGE.finditer(text)]
    if math.prod(map(len, ranges)) > MOST_EXPANDED:
        raise ConfigError(FIELD, text, f"stands for too many names; at most {MOST_EXPANDED}")
    between = _RANGE.sub("\0", text).split("\0")
    return [
        "".join(itertools.chain.from_iterable(zip(between, [*chosen, ""], strict=True)))
        for chosen in itertools.product(*ranges)
    ]


def _numbers(first: str, last: str) -> list[str]:
    """All numbers of a range, as wide as the wider end where one of them begins with a zero."""
    start, stop = int(first), int(last)
    step = 1 if stop >= start else -1
    if abs(stop - start) >= MOST_EXPANDED:
        raise ConfigError(FIELD, f"{{{first}..{last}}}", f"stands for too many names; at most {MOST_EXPANDED}")
    width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(start, stop + step, step)]


def split_inputs(text: str) -> list[str]:
    """The parts of a comma-separated text, or those of a JSON list, where a part may hold a comma itself."""
    if text.startswith("["):
        with contextlib.suppress(ValueError):  # it begins a glob
            return [str(part) for part in json.loads(text)] or [""]
    return [part.strip() for part in text.split(",")]


def interleaved(streams: Iterable[Iterator[T]]) -> Iterator[T]:
    """Several streams as one, so many at the same time and each at most a slice ahead; each keeps its own order."""
    coming = iter(streams)
    pool = ThreadPoolExecutor(THREADS)
    waiting: dict[Future[list[T]], Iterator[T]] = {}
    try:
        while True:
            for stream in itertools.islice(coming, THREADS - len(waiting)):
                waiting[pool.submit(_slice, stream)] = stream
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                stream, items = waiting.pop(future), future.result()
                if items:
                    waiting[pool.submit(_slice, stream)] = stream
                yield from items
    finally:
        pool.shutdown(cancel_futures=True)


def _slice(stream: Iterator[T]) -> list[T]:
    return list(itertools.islice(stream, SLICE))


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    """Matches what the glob names, and whatever lies below that."""
    return re.compile(f"{glob_translate(pattern)}|{glob_translate(f'{pattern}/**')}")
