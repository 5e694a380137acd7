"""Read what ``torch.save`` wrote, in each format that it has had, without running anything in it.

zip
    Since torch 1.6: ``data.pkl``, and the numbers of each storage as ``data/<key>``; not compressed.
stream
    Before, and on demand: pickles one after another (a magic number, a version, the system, the object, the keys of its
    storages), then the storages.
tar
    Before torch 0.1.10, and torchvision's first ResNets: ``storages``, ``tensors`` and ``pickle``.

Numbers are read for those tensors alone that are asked for, and what is read is no longer than the file.
"""

import contextlib
import io
import itertools
import math
import os
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from pspnet_core.checkpoints.pickles import Made, Reference, UnsupportedError, mapping, read_pickle

LARGEST_DIRECTORY = 2**26
"""Bytes of a zip directory; one of so many takes a gigabyte."""
_PIECE = 2**20
_MOST_AXES = 16
_TAR_MEMBERS = 16  # it has four
_MOST = 2**48
_LONGEST_KEY = 100
_MOST_ARGUMENTS = 8  # of what makes a tensor or names a storage; one tuple may be given to many
_MAGIC = 0x1950A86A20F9469CFC6C  # of the stream
_TYPED: dict[str, torch.dtype] = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
}
_STORAGES: dict[str, torch.dtype] = {
    **{f"torch.{device}{name}Storage": kind for name, kind in _TYPED.items() for device in ("", "cuda.")},
    "torch.storage.UntypedStorage": torch.uint8,
}
_DTYPES = {str(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}


class StorageSpec(NamedTuple):
    """A storage by its key in the file, the type of its numbers, and which of them a view begins with."""

    key: str
    dtype: torch.dtype
    start: int


class TensorSpec(NamedTuple):
    """A tensor before its numbers are read.

    Attributes:
        key: of its storage.
        dtype: type of its numbers.
        offset: place of the first number in the storage.
        shape: how many numbers it has along each axis.
        stride: how many numbers lie between neighbours along each axis.
    """

    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, data: bytearray) -> Tensor:
        """The tensor, on the memory of its storage.

        Raises:
            ValueError: it reaches beyond.
        """
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        count = len(data) // self.dtype.itemsize
        last = self.offset + sum((side - 1) * step for side, step in zip(self.shape, self.stride, strict=True))
        if last >= count:
            raise ValueError(f"a tensor of {last + 1} numbers, of which there are {count}")
        return torch.frombuffer(data, dtype=self.dtype, count=count).as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True, kw_only=True)
class TorchFile:
    """A file that is open.

    Attributes:
        content: what was saved, as ``read_pickle`` gives it.
        length: of the file, in bytes.
        read: gives the bytes of a storage by its key.
        tensors: those that the pickle refers to, by their ids: in the tar format only.
    """

    content: Any
    length: int
    read: Callable[[str], bytearray]
    tensors: Mapping[str, TensorSpec] | None = None

    def tensors_of(self, entries: Mapping[Any, object]) -> dict[str, TensorSpec]:
        """The tensors among entries, by their names."""
        named = ((name, value) for name, value in entries.items() if isinstance(name, str))
        return {name: spec for name, value in named if (spec := self._spec(value))}

    def _spec(self, value: object) -> TensorSpec | None:
        """The tensor that an object of ``content`` is; None for anything else, a sparse or quantised tensor too."""
        for _ in range(_MOST_AXES):  # a wrapper may hold itself
            if isinstance(value, Made) and value.path in _WRAPPERS:
                value = _WRAPPERS[value.path](value)
        if isinstance(value, Reference) and self.tensors is not None:
            return self.tensors[_key(value.id)]
        if isinstance(value, Made) and value.path in _TENSORS:
            return _TENSORS[value.path](*value.arguments[:_MOST_ARGUMENTS])
        return None

    def load(self, specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
        """Read tensors.

        Raises:
            ValueError: the file ends before they do, or they claim to be more than it is.
        """
        # Storages may overlap in a file and tensors in a storage, or repeat one number for ever.
        self._check(sum(math.prod(spec.shape) for spec in specs.values()))
        storages, total = dict[str, bytearray](), 0
        for key in {spec.key: None for spec in specs.values()}:
            storages[key] = self.read(key)
            total += len(storages[key])
            self._check(total)
        return {name: spec.view(storages[spec.key]) for name, spec in specs.items()}

    def _check(self, claimed: int) -> None:
        if claimed > self.length:
            raise ValueError(f"{claimed} numbers or bytes of weights in a file of {self.length} bytes")


@contextlib.contextmanager
def open_torch_file(path: Path) -> Iterator[TorchFile]:
    """Open a file that ``torch.save`` wrote.

    Raises:
        OSError: it cannot be read.
        UnsupportedError: it is sound and not read here.
        Exception: of almost any kind, when it is no such file, or a damaged one.
    """
    with path.open("rb") as plain, _Reader(plain, os.fstat(plain.fileno()).st_size) as file:
        start = file.read(512)
        file.seek(0)
        if start.startswith(b"PK\3\4"):
            yield _open_zip(file)
        elif start[257:262] == b"ustar":
            yield _open_tar(file)
        else:
            yield _open_stream(file)


class _Reader(io.BufferedReader):
    """A file that reserves memory for no more than it has, whatever length it is asked for.

    Attributes:
        length: of the file, in bytes.
        most: how many of them may be read at once.
    """

    def __init__(self, raw: Any, length: int) -> None:
        super().__init__(raw)
        self.length = self.most = length

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(self.most + 1 if size is None or size < 0 else min(size, self.most + 1))
        if len(data) > self.most:
            raise UnsupportedError(f"more than {self.most} bytes at once")
        return data


def _take(file: IO[bytes], size: int) -> bytearray:
    """So many bytes, piece by piece, so that memory follows what is there and not what is claimed."""
    data = bytearray()
    while piece := file.read(min(_PIECE, size - len(data))):
        data += piece
    if len(data) < size:
        raise EOFError(f"{len(data)} bytes of {size}")
    return data


# The formats


def _open_zip(file: _Reader) -> TorchFile:
    file.most = min(file.length, LARGEST_DIRECTORY)
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise UnsupportedError("a TorchScript program")
    [folder] = [name.removesuffix("data.pkl") for name in names if re.fullmatch(r"[^/]*/data\.pkl", name)]

    def member(name: str) -> IO[bytes]:
        entry = archive.getinfo(folder + name)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UnsupportedError(f"a {name} that is compressed")
        if entry.CRC == 0:  # torch has an option to leave it out
            entry.CRC = None  # type: ignore[assignment]
        return archive.open(entry)

    if f"{folder}byteorder" in names:
        _check_order(member("byteorder").read(_PIECE) == b"little")
    content = read_pickle(_Reader(member("data.pkl"), file.length)).content
    return TorchFile(
        content=content,
        length=file.length,
        read=lambda key: _take(member(f"data/{key}"), archive.getinfo(f"{folder}data/{key}").file_size),
    )


def _open_stream(file: _Reader) -> TorchFile:
    magic, _, system, saved, keys = (read_pickle(file) for _ in range(5))
    if magic.content != _MAGIC:
        raise ValueError("another magic number")
    _check_order((mapping(system.content) or {}).get("little_endian"))
    storages = [_storage(each) for each in saved.references if each.id[0] == "storage"]
    dtypes = {storage.key: storage.dtype for storage in storages}
    places = {key: _pass_storage(file, dtypes[key]) for key in map(_key, keys.content)}
    return TorchFile(content=saved.content, length=file.length, read=_reading(file, places))


def _open_tar(file: _Reader) -> TorchFile:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        starts = {member.name: member.offset_data for member in itertools.islice(archive, _TAR_MEMBERS)}
    file.seek(starts["storages"])
    storages, places = {}, {}
    for _ in range(read_pickle(file).content):
        key, _, kind = read_pickle(file).content
        storages[_key(key)] = StorageSpec(_key(key), _STORAGES[kind.path], 0)
        places[_key(key)] = _pass_storage(file, _STORAGES[kind.path])
    for key, root, start, _ in read_pickle(file).content:
        storages[_key(key)] = storages[_key(root)]._replace(start=_number(start))
    file.seek(starts["tensors"])
    tensors = {}
    for _ in range(read_pickle(file).content):
        key, storage, _ = read_pickle(file).content
        tensors[_key(key)] = _pass_tensor(file, storages[_key(storage)])
    file.seek(starts["pickle"])
    content = read_pickle(file).content
    return TorchFile(content=content, length=file.length, read=_reading(file, places), tensors=tensors)


def _check_order(little: object) -> None:
    if not little:
        raise UnsupportedError("numbers of a big-endian machine")


def _pass_storage(file: _Reader, dtype: torch.dtype) -> tuple[int, int]:
    """Read where a storage begins, and its size in bytes; leave the file behind it."""
    (count,) = struct.unpack("<q", file.read(8))
    start, size = file.tell(), _number(count) * dtype.itemsize
    if start + size > file.length:
        raise EOFError(f"{file.length - start} bytes of {size}")
    file.seek(start + size)
    return start, size


def _pass_tensor(file: _Reader, storage: StorageSpec) -> TensorSpec:
    axes, _ = struct.unpack("<ii", file.read(8))
    size, stride = (struct.unpack(f"<{axes}q", file.read(8 * axes)) for _ in range(2))
    (offset,) = struct.unpack("<q", file.read(8))
    return _tensor(storage, offset, size, stride)


def _reading(file: _Reader, places: Mapping[str, tuple[int, int]]) -> Callable[[str], bytearray]:
    def read(key: str) -> bytearray:
        start, size = places[key]
        file.seek(start)
        return _take(file, size)

    return read


# What the pickle calls


def _number(value: object) -> int:
    """A place or a length; Python's integers have no end."""
    if type(value) is not int or not 0 <= value < _MOST:
        raise ValueError("no length")
    return value


def _key(value: object) -> str:
    """An id; a tuple of tuples would take for ever to hash or to print, and a long text long to compare."""
    if not isinstance(value, str | int) or len(key := str(value)) > _LONGEST_KEY:
        raise ValueError("no key")
    return key


def _storage(reference: Reference) -> StorageSpec:
    _, kind, key, _, _, *view = reference.id[:_MOST_ARGUMENTS]
    return StorageSpec(_key(key), _STORAGES[kind.path], _number(view[0][1]) if view and view[0] else 0)


def _tensor(storage: StorageSpec, offset: object, size: Sequence[object], stride: Sequence[object]) -> TensorSpec:
    if not len(size) == len(stride) <= _MOST_AXES:
        raise ValueError("no shape")
    view = tuple(map(_number, size)), tuple(map(_number, stride))
    return TensorSpec(storage.key, storage.dtype, storage.start + _number(offset), *view)


def _check_plain(*metadata: object) -> None:
    """Of a tensor: torch notes here that its numbers are to be negated or conjugated."""
    if any(metadata):
        remedy = "where it was made, save its state_dict() after resolve_neg() and resolve_conj() of its tensors"
        raise UnsupportedError("a tensor whose numbers are to be negated or conjugated", remedy)


def _rebuilt(storage: Reference, offset: Any, size: Any, stride: Any, *more: Any) -> TensorSpec:
    _check_plain(*more[2:])
    return _tensor(_storage(storage), offset, size, stride)


def _rebuilt_typed(storage: Reference, offset: Any, size: Any, stride: Any, *more: Any) -> TensorSpec:
    _check_plain(*more[3:])
    return _tensor(_storage(storage)._replace(dtype=_DTYPES[more[2].path]), offset, size, stride)


_WRAPPERS: dict[str, Callable[[Made], object]] = {
    "torch._utils._rebuild_parameter": lambda made: made.arguments[0],
    "torch._utils._rebuild_parameter_with_state": lambda made: made.arguments[0],
    "torch._tensor._rebuild_from_type_v2": lambda made: Made(made.arguments[0].path, made.arguments[2]),
    "torch.nn.parameter.Parameter": lambda made: (made.arguments or made.state)[0],
}
"""What is called with a tensor, or with how to make one."""
_TENSORS: dict[str, Callable[..., TensorSpec]] = {
    "torch._utils._rebuild_tensor": _rebuilt,
    "torch._utils._rebuild_tensor_v2": _rebuilt,
    "torch._utils._rebuild_tensor_v3": _rebuilt_typed,
}
"""What makes tensors."""
