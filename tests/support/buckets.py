"""Buckets of every input format, with the same images in each, and what sources make of them."""

import datetime
import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.label_table.schema import LISTING
from pipelines.sources import SOURCES, Inputs, read_listed
from pipelines.storage import Store
from pspnet_core.errors import ImageError

DATE = datetime.date(2026, 1, 31)
LATER = datetime.datetime(2999, 1, 1, tzinfo=datetime.timezone.utc)

IMAGES = {
    "a.jpg": b"first" * 40,
    "b.PNG": b"second" * 30,
    "deep/c d#%.tiff": b"third" * 20,
    "deep/d.webp": b"fourth" * 10,
    "deep/e.bmp": b"fifth" * 5,
}


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """What was written.

    Attributes:
        input: what ``--input`` names it by.
        images: key in a listing -> bytes.
        holders: key in a listing -> path of the object that holds the image.
    """

    input: str
    images: Mapping[str, bytes]
    holders: Mapping[str, str]


def write_loose(store: Store) -> Bucket:
    for key, data in IMAGES.items():
        put(store, key, data)
    put(store, "readme.txt", b"no image")
    return Bucket(input=store.root, images=IMAGES, holders={key: key for key in IMAGES})


def write_archives(store: Store) -> Bucket:
    keys = list(IMAGES)
    holders = {
        f"{path}/{key}": path for path, some in (("one.tar", keys[:3]), ("deep/two.tar.gz", keys[3:])) for key in some
    }
    images = {key: IMAGES[key.removeprefix(f"{path}/")] for key, path in holders.items()}
    for path in ("one.tar", "deep/two.tar.gz"):
        members = [(key.removeprefix(f"{path}/"), data) for key, data in images.items() if holders[key] == path]
        labels = [(name + ".json", b"{}") for name, _ in members]
        put(store, path, tar([each for pair in zip(members, labels, strict=True) for each in pair], path))
    return Bucket(input=store.root, images=images, holders=holders)


def write_parquet(store: Store) -> Bucket:
    contents = list(IMAGES.values())
    numbered = pa.table({"image": contents[:3], "label": [1, 2, 3]})
    put(store, "one.parquet", parquet(numbered, row_group_size=2))
    structs = [{"bytes": data, "path": None} for data in contents[3:]]
    keyed = pa.table({"image": structs, "key": ["x/first", "second"]})
    put(store, "deep/two.parquet", parquet(keyed))
    keys = ["one.parquet/0", "one.parquet/1", "one.parquet/2", "deep/two.parquet/x/first", "deep/two.parquet/second"]
    holders = {key: "one.parquet" if key.startswith("one") else "deep/two.parquet" for key in keys}
    return Bucket(input=store.root, images=dict(zip(keys, contents, strict=True)), holders=holders)


def write_manifest(store: Store) -> Bucket:
    for key, data in IMAGES.items():
        put(store, f"photos/{key}", data)
    uris = {key: store.uri_of(f"photos/{key}") for key in IMAGES}
    put(store, "all.txt", "\n".join(["", *uris.values(), ""]).encode())
    return Bucket(
        input=store.uri_of("all.txt"),
        images={uris[key]: data for key, data in IMAGES.items()},
        holders={uris[key]: f"photos/{key}" for key in IMAGES},
    )


# How each format is written: a new row of SOURCES needs one here, and then has its contract tested.
WRITERS: Mapping[str, Callable[[Store], Bucket]] = {
    "images": write_loose,
    "webdataset": write_archives,
    "parquet": write_parquet,
    "manifest": write_manifest,
}


def listed(source: str, text: object, since: datetime.datetime | None = None, *allow: str) -> pa.Table:
    """A listing, in the order in which it comes."""
    inputs = Inputs.of(str(text), date=DATE, since=since, allow=allow)
    return pa.Table.from_batches(SOURCES[source].find(inputs), LISTING)


def outcomes(source: str, rows: pa.Table) -> dict[str, bytes | str]:
    """Key -> bytes or the kind of error."""
    keys = rows["key"].to_pylist()
    roots = {uri.removesuffix(key) or "/" for uri, key in zip(rows["uri"].to_pylist(), keys, strict=True)}
    results = read_listed(SOURCES[source], rows, inputs=sorted(roots), threads=3)
    told = [result.kind if isinstance(result, ImageError) else result for result in results]
    return dict(zip(keys, told, strict=True))


def put(store: Store, path: str, data: bytes) -> None:
    """Write an object, over another one if need be."""
    if not store.put_if_absent(path, data):
        found = store.stat(path)
        assert found is not None
        assert store.put_if_match(path, data, found.etag)


def tar(members: Sequence[tuple[str, bytes]], path: str = "x.tar", *, form: int = tarfile.USTAR_FORMAT) -> bytes:
    """An archive of these members, compressed where its name says so."""
    sink = io.BytesIO()
    with tarfile.open(
        fileobj=sink, mode="w" if path.endswith(".tar") else "w:gz", format=form, errors="surrogateescape"
    ) as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return sink.getvalue()


def parquet(table: pa.Table, *, row_group_size: int | None = None) -> bytes:
    """A Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=row_group_size)
    return sink.getvalue()
