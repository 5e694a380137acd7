"""Retry error rows: write the label files that hold them again, with all other rows unchanged.

find the label files with error rows -> read those images -> segment -> put the new rows in their places, in one
conditional PUT -> class statistics and run records of the plans whose rows have changed.
"""

import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.label_table.index import label_file_damage_told
from pipelines.label_table.ledger import Ledger, Plan, PlanSpec
from pipelines.label_table.schema import LISTING, MASKS
from pipelines.labelling.report.run_record import Summary
from pipelines.labelling.stages.chunks import (
    ENCODED,
    Chunk,
    RunContext,
    encoded,
    nothing_to_do,
    read_images,
    writable,
    written,
)
from pipelines.labelling.stages.clocks import Start
from pipelines.process.reading_back import read_back
from pipelines.storage import THREADS, ObjectChanged, ObjectMissing
from pipelines.storage.arrow import metadata_of, to_parquet
from pspnet_core.errors import KINDS, ConfigError
from pspnet_core.images.classes import ClassTable

log = logging.getLogger(__name__)
ALL = "all"
LASTING = frozenset({"Changed"})
"""Kinds that ``all`` leaves out: the content of that version is gone, and its successor is pending as a new image."""

_ATTEMPT = re.compile(r" \(attempt (\d+)\)$")


@dataclass(frozen=True, kw_only=True)
class FailedFile:
    """A label file with rows to try again.

    Attributes:
        path, etag: of the file, as it was looked at.
        spec: of the plan that it belongs to.
        rows: how many there are to try.
    """

    path: str
    etag: str
    spec: PlanSpec
    rows: int


def check_kinds(kinds: Sequence[str]) -> None:
    """ConfigError unless there are error rows of such kinds, one or more; ``all`` is one, too."""
    unknown = [kind for kind in kinds if kind not in (*KINDS, ALL)]
    if unknown or not kinds:
        raise ConfigError("retry_errors", ",".join(unknown), f"choose among {', '.join(KINDS)}, or all of them: {ALL}")


def find_failed(ledger: Ledger, kinds: Sequence[str]) -> list[FailedFile]:
    """The label files that hold error rows of some kinds, by path.

    Args:
        kinds: such as ``Missing``; ``all`` stands for all that may have another end.
    """
    specs: dict[int, PlanSpec] = {}
    found = []
    for path, etag, errors in _files_with_errors(ledger):
        rows = int(pc.sum(_chosen(errors, kinds)).as_py() or 0)
        if rows:
            number = _plan_of(ledger, path)
            if number not in specs:
                specs[number] = ledger.read_plan(number).spec
            found.append(FailedFile(path=path, etag=etag, spec=specs[number], rows=rows))
    return found


def by_mask(files: Sequence[FailedFile]) -> Iterator[tuple[str, list[FailedFile]]]:
    """The files of each mask format, which their new rows shall have as well."""
    formats: dict[str, list[FailedFile]] = defaultdict(list)
    for file in files:
        formats[file.spec.mask].append(file)
    yield from formats.items()


class ReadFailed:
    """Stage 1 of a retry: the images of a file's chosen rows. A chunk is a file, by its index."""

    def __init__(self, context: RunContext, files: Sequence[FailedFile], kinds: Sequence[str]) -> None:
        self.context, self.files, self.kinds = context, files, kinds

    def __call__(self, number: int) -> Chunk:
        """As ``Read``; there is nothing to do where another run has written the file meanwhile."""
        start = Start.now()
        attempt = self.context.coordinator.admit(number)
        if not attempt:
            return nothing_to_do(number)
        file = self.files[number]
        found = _read(self.context, file)
        if found is None:
            return encoded(number, ENCODED.empty_table(), images=file.rows, since=start)
        table, _ = found
        rows = table.filter(_chosen(table["error"], self.kinds)).select(LISTING.names)
        return read_images(number, file.spec, rows, attempt=attempt, since=start)


class Rewrite:
    """Stage 3 of a retry: the new rows in the places of the old ones."""

    def __init__(self, context: RunContext, files: Sequence[FailedFile], kinds: Sequence[str]) -> None:
        self.context, self.files, self.kinds = context, files, kinds

    def __call__(self, chunk: Chunk) -> Chunk:
        """Write the file anew unless it has changed; the chunk's table is gone then."""
        start = Start.now()
        with self.context.coordinator.writing(chunk.number) as attempt:
            chunk = writable(chunk, attempt)
            mine = not len(chunk.table) or self._put(chunk.table, self.files[chunk.number])
        return written(chunk, since=start, counted=mine)

    def _put(self, new: pa.Table, file: FailedFile) -> bool:
        found = _read(self.context, file)
        if found is None:
            return False
        old, metadata = found
        chosen = _chosen(old["error"], self.kinds)
        new = _successors(new, old.filter(chosen))
        # Each row from the old table or, behind its end, from the new one.
        places = pc.if_else(
            chosen,
            pc.add(pc.cumulative_sum(chosen.cast(pa.int64())), len(old) - 1),
            pa.array(range(len(old)), pa.int64()),
        )
        merged = pa.concat_tables([old, new]).take(places).combine_chunks()
        return self.context.output.put_if_match(file.path, to_parquet(merged, metadata=metadata), file.etag)


def reconcile(ledger: Ledger, classes: ClassTable) -> None:
    """Bring class statistics and run records in line with the label table, plan by plan.

    A retry that was killed may have left them behind; the number of error rows of each kind shows it.
    """
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for path, _, errors in _files_with_errors(ledger):
        counts[_plan_of(ledger, path)].update(text.partition(":")[0] for text in errors.drop_null().to_pylist())
    latest = ledger.latest_plan()
    for number in range(latest.number + 1 if latest else 0):
        plan = ledger.read_plan(number)
        if ledger.is_finished(plan):
            _bring_up(ledger, plan, counts[number], classes)


def _bring_up(ledger: Ledger, plan: Plan, errors: Counter[str], classes: ClassTable) -> None:
    """Statistics before record: a record that agrees says that both are done."""
    try:
        recorded = read_back(_Record, ledger.store.read(ledger.paths.run(plan.run_id)))
    except ValueError as error:
        log.warning("the record of run %s is damaged (%s): it stays as it is", plan.run_id, error)
        return
    if recorded.errors == errors:
        return
    if ledger.lost_chunks(plan):
        log.warning("label files of run %s were deleted: its statistics and its record stay as they are", plan.run_id)
        return
    while not _brought_up(ledger, plan, classes):
        pass  # another retry ended at the same moment: what it wrote may be older than what there is now


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What is read back of a run record."""

    errors: dict[str, int]


def _brought_up(ledger: Ledger, plan: Plan, classes: ClassTable) -> bool:
    """Write both objects; False where another run wrote one of them since the label table was read."""
    store, statistics, run = (
        ledger.store,
        ledger.paths.class_stats(plan.date, plan.run_id),
        ledger.paths.run(plan.run_id),
    )
    found = [store.stat(path) for path in (statistics, run)]
    record, summary = json.loads(store.read(run)), Summary.of(ledger, plan, classes)
    changed = {"errors": dict(summary.errors), "labelled": plan.images - sum(summary.errors.values())}
    contents = to_parquet(summary.table(classes, plan.run_id)), json.dumps(record | changed, indent=1).encode()
    return all(
        store.put_if_match(path, data, before.etag) if before else store.put_if_absent(path, data)
        for path, data, before in zip((statistics, run), contents, found, strict=True)
    )


def _files_with_errors(ledger: Ledger) -> Iterator[tuple[str, str, pa.ChunkedArray]]:
    """Path, etag and column ``error`` of each label file with error rows, by path."""

    def look(path: str) -> pa.ChunkedArray | None:
        try:
            with label_file_damage_told(ledger.store, path), ledger.store.open(path) as stream:
                file = pq.ParquetFile(stream)
                return file.read(["error"])["error"] if _has_errors(file) else None
        except (ObjectChanged, ObjectMissing):  # the run that writes it anew now also brings the rest in line
            return None

    listed = ledger.store.list(ledger.paths.masks, suffixes={".parquet"})
    items = [item for item in listed if ledger.paths.chunk_of(item.key)]
    with ThreadPoolExecutor(THREADS) as pool:
        for item, errors in zip(items, pool.map(look, [item.key for item in items]), strict=True):
            if errors is not None:
                yield item.key, item.etag, errors


def _plan_of(ledger: Ledger, path: str) -> int:
    """Number of the plan that a label file belongs to."""
    found = ledger.paths.chunk_of(path)
    assert found, f"{path} is no chunk"
    return found[0]


def _has_errors(file: pq.ParquetFile) -> bool:
    """Whether there may be error rows, by the statistics of the footer, which cost no reading of rows."""
    position = [file.schema.column(index).path for index in range(len(file.schema))].index("error")
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    known = [(group.num_rows, group.column(position).statistics) for group in groups]
    return any(found is None or not found.has_null_count or found.null_count < rows for rows, found in known)


def _chosen(errors: pa.ChunkedArray, kinds: Collection[str]) -> pa.ChunkedArray:
    """Which rows are of these kinds; never null."""
    found = pc.replace_substring_regex(errors, ":.*", "")
    if ALL in kinds:
        wanted = pc.and_(pc.is_valid(found), pc.invert(pc.is_in(found, pa.array(sorted(LASTING)))))
    else:
        wanted = pc.is_in(found, pa.array(sorted(kinds), pa.string()))
    return pc.fill_null(wanted, False)


def _read(context: RunContext, file: FailedFile) -> tuple[pa.Table, dict[str, object]] | None:
    """A label file's rows and metadata, or None when it is no longer the one that was looked at."""
    try:
        data = context.output.read_if(file.path, file.etag)
    except (ObjectChanged, ObjectMissing):
        return None
    with label_file_damage_told(context.output, file.path):
        opened = pq.ParquetFile(pa.BufferReader(data))
        return opened.read().cast(MASKS), metadata_of(opened)


def _successors(new: pa.Table, old: pa.Table) -> pa.Table:
    """New rows as rows of the old ones' plan, whose run and time they keep; errors that came again are counted."""
    texts = [
        text and f"{text} (attempt {_attempts(before) + 1})"
        for text, before in zip(new["error"].to_pylist(), old["error"].to_pylist(), strict=True)
    ]
    kept = {"error": pa.array(texts, pa.string()), "run_id": old["run_id"], "labelled_at": old["labelled_at"]}
    for name, column in kept.items():
        new = new.set_column(new.schema.get_field_index(name), MASKS.field(name), column)
    return new


def _attempts(error: str) -> int:
    found = _ATTEMPT.search(error)
    return int(found[1]) if found else 1
