"""Files of weights that must neither run anything nor take memory or time, each a function and a row of ``POISONS``.

``play`` converts files in a process of its own, whose memory and time for each are limited::

    python -m tests.support.checkpoint_poisons FILE...

which prints a line of JSON for each: exit code and what was told.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import io
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.support.checkpoint_shapes import CONFIG, mmseg_network, save, smp_network

HEADROOM = 2**30
"""Bytes that a conversion may take."""
SECONDS = 20
"""Processor time that a conversion may take; the process ends there."""
MARKER = "made"


@dataclass(frozen=True, kw_only=True)
class Ground:
    """Where a poison is made.

    Attributes:
        folder: of the file and what lies beside it; nothing may appear in it by the name of ``MARKER``.
        state: of a small network.
    """

    folder: Path
    state: dict[str, Tensor]

    @property
    def command(self) -> str:
        """A shell command that shows that it was run."""
        return f"touch {self.folder / MARKER}"

    @property
    def code(self) -> str:
        """The same in Python."""
        return f"open({str(self.folder / MARKER)!r}, 'w')"

    def write(self, content: Any, name: str = "x.pth") -> Path:
        """What ``torch.save`` writes of a content, or bytes as they are."""
        save(content, self.folder / name)
        return self.folder / name


@dataclass(frozen=True, kw_only=True)
class Poison:
    """A file, and what becomes of it.

    Attributes:
        write: makes it.
        told: pattern of the one line that is told; empty where the weights are sound and converted.
    """

    write: Callable[[Ground], Path]
    told: str = ""


_STORAGE = object()


class Call:
    """Pickles as a call, with a state and entries; what it makes may be called in turn."""

    def __init__(self, *call: Any, state: Any = None, entries: Iterable[Any] | None = None) -> None:
        self.call, self.state, self.entries = call, state, entries

    def __call__(self) -> None:
        """For pickle, which asks whether it could."""

    def __reduce__(self) -> tuple[Any, ...]:
        function, *arguments = self.call
        return function, tuple(arguments), self.state, None, None if self.entries is None else iter(self.entries)


def beside(call: Callable[[Ground], Any]) -> Poison:
    """A call beside sound weights: dropped."""
    return Poison(write=lambda ground: ground.write({"state_dict": ground.state, "epoch": call(ground)}))


def instead(call: Callable[[Ground], Any], told: str) -> Poison:
    """A call in place of everything."""
    return Poison(write=lambda ground: ground.write(call(ground)), told=told)


def raw(*parts: bytes, told: str = "or a damaged one") -> Poison:
    """A zip whose pickle is these bytes."""
    return Poison(write=lambda ground: ground.write(zipped({"data.pkl": b"".join(parts)})), told=told)


def zipped(members: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    """As ``torch.save`` names them."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return sink.getvalue()


def tensor(
    size: Any, stride: Any, offset: Any = 0, key: Any = "0", kind: str = "Float", more: tuple[Any, ...] = ()
) -> bytes:
    """The pickle of a tensor by what it claims, without the opcodes around; ``more`` are arguments after the usual."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", getattr(torch, f"{kind}Storage"), key, "cpu", 2**60) if value is _STORAGE else None

    sink = io.BytesIO()
    hooks = OrderedDict[str, Any]()
    Pickler(sink, 2).dump(Call(torch._utils._rebuild_tensor_v2, _STORAGE, offset, size, stride, False, hooks, *more))
    return sink.getvalue()[2:-1]


def claiming(*claim: Any, told: str = "or a damaged one", **more: Any) -> Poison:
    """A state dict of one tensor."""
    tree = b"\x80\x02}X\x01\x00\x00\x00a" + tensor(*claim, **more) + b"s."
    return Poison(write=lambda ground: ground.write(zipped({"data.pkl": tree, "data/0": bytes(400)})), told=told)


def described(meta: Any) -> Poison:
    """Metadata of sound weights: dropped."""
    return Poison(write=lambda ground: ground.write({"state_dict": ground.state, "meta": {"x": meta}}))


def nested(depth: int = 64) -> tuple[Any, ...]:
    """2 to this power of empty tuples, if somebody were to count them: to hash or to print it takes for ever."""
    value: tuple[Any, ...] = ()
    for _ in range(depth):
        value = (value, value)
    return value


def _hidden_in_every_place(ground: Ground) -> Path:
    call = Call(os.system, ground.command)
    attributes = nn.Parameter(torch.ones(2))
    attributes.evil = call  # type: ignore[attr-defined]
    return ground.write({**ground.state, "a": call, "b": attributes, 3: [call, {"c": (call,)}], "meta": {"cfg": call}})


def _holding_itself(ground: Ground) -> Path:
    content: dict[str, Any] = {"epoch": 1}
    content["state_dict"] = content["model"] = content
    return ground.write(content)


def _config(text: str, told: str) -> Poison:
    def write(ground: Ground) -> Path:
        return ground.write({"state_dict": mmseg_network().state_dict(), "meta": {"cfg": text}})

    return Poison(write=write, told=told)


def _expanded(ground: Ground) -> Path:
    """A classifier for 2^31 classes of one number."""
    head = torch.ones(1).expand(2**31, 32, 3, 3)
    return ground.write({**ground.state, "segmentation_head.0.weight": head})


def _one_storage_for_all(ground: Ground) -> Path:
    """Every weight of a network is the same few numbers, its widest layer a hundred times as many."""
    sizes = {name: tuple(value.shape) for name, value in mmseg_network().state_dict().items()}
    sizes["decode_head.bottleneck.conv.weight"] = (4096, 512 + 4 * 128, 3, 3)
    numbers = torch.ones(2**20)
    return ground.write({name: numbers.as_strided(size, [0] * len(size)) for name, size in sizes.items()})


def _one_tensor_for_all(ground: Ground) -> Path:
    """Ten thousand names of one tensor, that is made with a million arguments."""
    made = _TEXT + tensor((1,), (1,), more=(None,) * 10**6) + b"r\xff\0\0\0"
    names = b"".join(b"X\x04\0\0\0%04dj\xff\0\0\0" % number for number in range(10_000))
    return ground.write(zipped({"data.pkl": b"\x80\x02}(" + made + names + b"u.", "data/0": bytes(4)}))


def _overlapping(ground: Ground) -> Path:
    """A directory that has the same 4 MB a thousand times."""
    tree = b"".join(
        b"X" + struct.pack("<I", 4) + b"%04d" % number + tensor((2**20,), (1,), key=str(number))
        for number in range(1000)
    )
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}(" + tree + b"u.")
        archive.writestr("archive/data/0", bytes(2**22))
        first = archive.infolist()[-1]
        for number in range(1, 1000):
            again = zipfile.ZipInfo(f"archive/data/{number}")
            again.header_offset, again.CRC = first.header_offset, first.CRC
            again.file_size = again.compress_size = first.file_size
            archive.filelist.append(again)
    return ground.write(sink.getvalue())


def _large_directory(ground: Ground) -> Path:
    data = zipped({"data.pkl": b"N."})
    start, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    entry, count = data[start:end], 2**27 // (end - start)
    tail = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0, 0, count * len(entry), start, 0)
    with (ground.folder / "x.pth").open("wb") as file:
        file.write(data[:start])
        file.writelines([entry] * count)
        file.write(tail)
    return ground.folder / "x.pth"


def stream(content: bytes, keys: bytes = pickle.dumps([], 2), rest: bytes = b"") -> Callable[[Ground], Path]:
    """The format before the zip file."""
    start = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    data = b"".join(pickle.dumps(each, 2) for each in start) + content + keys + rest
    return lambda ground: ground.write(data)


def tarred(members: dict[str, bytes], sparse: str = "") -> Callable[[Ground], Path]:
    """The first format; one member may say that it is 2^60 zeros."""

    def write(ground: Ground) -> Path:
        with tarfile.open(ground.folder / "x.pth", "w:", format=tarfile.PAX_FORMAT) as archive:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                if name == sparse:
                    member.pax_headers = {"GNU.sparse.size": str(2**60), "GNU.sparse.map": ""}
                archive.addfile(member, io.BytesIO(data))
        return ground.folder / "x.pth"

    return write


def _headers_in_headers(ground: Ground) -> Path:
    header = tarfile.TarInfo("x")
    header.type = tarfile.XHDTYPE
    return ground.write(header.tobuf(tarfile.USTAR_FORMAT) * 2000)


def safetensors(header: bytes, claim: int | None = None, data: bytes = b"") -> Poison:
    """A file of this header."""
    size = struct.pack("<Q", len(header) if claim is None else claim)
    return Poison(write=lambda ground: ground.write(size + header + data, "x.safetensors"), told="or a damaged one")


def index(shards: Any, told: str) -> Poison:
    """An index that lists these; JSON as it stands, if it is text."""

    def write(ground: Ground) -> Path:
        text = shards if isinstance(shards, str) else json.dumps({"weight_map": shards})
        return ground.write(text.encode(), "x.safetensors.index.json")

    return Poison(write=write, told=told)


def odd(make: Callable[[Path], object], told: str) -> Poison:
    """What is no plain file."""

    def write(ground: Ground) -> Path:
        make(ground.folder / "x.pth")
        return ground.folder / "x.pth"

    return Poison(write=write, told=told)


HELD = "holds an object of {}; its first keys: none; where it was made, save its state_dict"
NONE = "holds no weights by name"
DAMAGED = "is no file of weights, or a damaged one .*; download it again"
ALONE = "; where it was made, save its state_dict"
STEPS = f"source=[^:]*: holds a pickle of more than 2000000 steps{ALONE}"
_TEXT = b"X\x01\x00\x00\x00a"
_COLLIDING = 2**61 - 1
"""Python hashes all multiples of it to 0."""

POISONS: dict[str, Poison] = {
    # What runs when a pickle is read.
    "a system call": instead(lambda ground: Call(os.system, ground.command), HELD.format("posix.system")),
    "a system call beside weights": beside(lambda ground: Call(os.system, ground.command)),
    "calls in every place": Poison(write=_hidden_in_every_place),
    "eval": beside(lambda ground: Call(eval, ground.code)),
    "exec": beside(lambda ground: Call(exec, ground.code)),
    "a process": beside(lambda ground: Call(subprocess.Popen, ground.command, -1, None, None, None, None, None, True)),
    "partial": beside(lambda ground: Call(Call(functools.partial, os.system, ground.command))),
    "getattr": beside(lambda ground: Call(Call(getattr, builtins.__import__, "__call__"), "antigravity")),
    "a state": beside(lambda ground: Call(functools.partial, print, state=(os.system, (ground.command,), {}, {}))),
    "an attribute of a function": beside(
        lambda ground: Call(print, state=(None, {"__doc__": Call(eval, ground.code)}))
    ),
    "entries": beside(lambda ground: Call(OrderedDict, entries=[(1, Call(eval, ground.code))])),
    "a call as a module": raw(b"\x80\x04", b"cos\nsystem\n", b"X\x04\x00\x00\x00true", b"\x93.", told=NONE),
    "an instance": raw(b"(", _TEXT, b"ios\nsystem\n."),
    "an object": raw(b"(cos\nsystem\n", _TEXT, b"o."),
    "an extension": raw(b"\x82\x01."),
    # What takes memory or time.
    "marks": raw(b"(" * 2_000_010, told=STEPS),
    "tuples in tuples": raw(b")", b"\x85" * 300_000, b".", told=NONE),
    "a memo of 2^32": raw(b"]r\xff\xff\xff\xff.", told=NONE),
    "a text of 2^40": raw(b"\x8d", struct.pack("<Q", 2**40), b"abc."),
    "bytes of 2^62": raw(b"\x8e", struct.pack("<Q", 2**62), b"abc."),
    "an array of bytes of 2^40": raw(b"\x96", struct.pack("<Q", 2**40), b"abc."),
    "a frame of 2^60": raw(b"\x80\x04\x95", struct.pack("<Q", 2**60), b"N.", told=NONE),
    "an integer of a million digits": raw(b"L", b"9" * 10**6, b"L\n."),
    "a line without an end": raw(b"c" + b"a" * 10**7),
    "a key that takes for ever to hash": Poison(
        write=lambda ground: ground.write({**ground.state, "x": Call(OrderedDict, entries=[(nested(), 1)])})
    ),
    "numbers of one hash": beside(
        lambda ground: Call(OrderedDict, entries=[(number * _COLLIDING, 1) for number in range(60_000)])
    ),
    "places of one hash": raw(
        b"]", b"".join(b"p%d\n" % (number * _COLLIDING) for number in range(60_000)), b".", told="no place in the memo"
    ),
    "a key of a long number": raw(
        b"}\x8b", struct.pack("<I", 2**23), b"\x01" * 2**23, b"q\0000", b"h\0Ns" * 20_000, b".", told=NONE
    ),
    "keys of the same long text": raw(
        b"}",
        *(b"X" + struct.pack("<I", 2**23) + b"x" * 2**23 + b"q" + place + b"0" for place in (b"\0", b"\1")),
        b"h\0Nsh\1Ns" * 60_000,
        b".",
        told=NONE,
    ),
    "names of a long text": raw(
        b"X", struct.pack("<I", 2**20), b"x" * 2**20, b"q\0", b"h\0h\0\x93" * 3000, b".", told=NONE
    ),
    "pairs of one list": described([Call(OrderedDict, [[0, 1]] * 100_000)] * 5000),
    "dicts of one list": raw(
        *(b"](", b"N" * 10_000, b"e\x85q\0ccollections\nOrderedDict\nq\1", b"h\1h\0R" * 100_000, b"."), told=STEPS
    ),
    "arguments of one tensor": Poison(write=_one_tensor_for_all, told="is none of semseg"),
    "an array of long texts": described([np.array(["x" * 9999])] * 200_000),
    "a dict that holds itself": Poison(write=_holding_itself, told=NONE),
    "names that take for ever to print": Poison(
        write=lambda ground: ground.write({"state_dict": ground.state, "meta": {"CLASSES": nested()}})
    ),
    "names of half a gigabyte": Poison(
        write=lambda ground: ground.write({"state_dict": ground.state, "meta": {"CLASSES": ["x" * 2**20] * 500}})
    ),
    # What claims to be large.
    "a tensor of 2^60": claiming((2**60,), (1,)),
    "a tensor of 2^40 of one number": claiming((2**40,), (0,), told="in a file of"),
    "a tensor of 2^47 by 2^47": claiming((2**47, 2**47), (2**47, 1), told="in a file of"),
    "a tensor of many axes": claiming((1,) * 10**4, (1,) * 10**4),
    "a tensor beyond its storage": claiming((100,), (1,), 1, told="a tensor of 101 numbers, of which there are 100"),
    "a tensor before its storage": claiming((1,), (1,), -1),
    "a tensor of a negative stride": claiming((2,), (-1,), 1),
    "a tensor of a size that is none": claiming((2.5,), (1,)),
    "an integer of a million bytes": claiming((2 ** (8 * 10**6),), (1,)),
    "a storage that is not there": claiming((1,), (1,), key="7"),
    "a storage in another folder": claiming((1,), (1,), key="../data.pkl"),
    "a storage of a key that is none": claiming((1,), (1,), key=1.5),
    "a network of one number": Poison(write=_expanded, told="in a file of"),
    "a network of a few numbers": Poison(write=_one_storage_for_all, told="in a file of"),
    # Containers.
    "a compressed zip": Poison(
        write=lambda ground: ground.write(
            zipped(
                {"data.pkl": b"}" + _TEXT + tensor((2**24,), (1,)) + b"s.", "data/0": bytes(2**24)},
                zipfile.ZIP_DEFLATED,
            )
        ),
        told=f"holds a data.pkl that is compressed{ALONE}",
    ),
    "a zip whose members overlap": Poison(write=_overlapping, told="or a damaged one"),
    "a zip of a large directory": Poison(write=_large_directory, told="bytes at once"),
    "a zip without a pickle": Poison(write=lambda ground: ground.write(zipped({"data/0": b"x"})), told=DAMAGED),
    "a zip of two": Poison(
        write=lambda ground: ground.write(zipped({"data.pkl": b"N.", "../b/data.pkl": b"N.", "x/data.pkl": b"N."})),
        told=NONE,
    ),
    "a program": Poison(
        write=lambda ground: ground.write(zipped({"data.pkl": b"N.", "constants.pkl": b"N."})),
        told=f"holds a TorchScript program{ALONE}",
    ),
    "a stream of 2^60": Poison(
        write=stream(
            b"\x80\x02}" + _TEXT + tensor((1,), (1,)) + b"s.", pickle.dumps(["0"], 2), struct.pack("<q", 2**60)
        ),
        told=DAMAGED,
    ),
    "a stream of keys that take for ever": Poison(write=stream(b"N.", pickle.dumps([nested()], 2)), told="no key"),
    "a stream of a system call": Poison(
        write=lambda ground: stream(pickle.dumps(Call(os.system, ground.command), 2))(ground), told="an object of"
    ),
    "a tar of 2^60": Poison(
        write=tarred({"storages": pickle.dumps(2**60), "tensors": b"", "pickle": b""}), told=DAMAGED
    ),
    "a tar of zeros": Poison(
        write=tarred({"storages": pickle.dumps(1), "tensors": b"", "pickle": b""}, sparse="storages"), told=DAMAGED
    ),
    "a tar of headers": Poison(write=_headers_in_headers, told=DAMAGED),
    "a tar of a system call": Poison(
        write=lambda ground: tarred({"storages": pickle.dumps(Call(os.system, ground.command), 2)})(ground),
        told=DAMAGED,
    ),
    "safetensors of 2^60": safetensors(b"{}", 2**60),
    "safetensors of a tensor of 2^60": safetensors(
        b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}', data=bytes(4)
    ),
    "safetensors in safetensors": safetensors(b'{"a":' + b"[" * 100_000),
    # An index.
    "shards elsewhere": index({"a": "../x.safetensors"}, "leads out of its folder"),
    "shards at a path": index({"a": "/etc/passwd"}, "leads out of its folder"),
    "shards below a path": index({"a": "b//etc/passwd"}, "leads out of its folder"),
    "a shard that is the index": index({"a": "x.safetensors.index.json"}, "or a damaged one"),
    "a shard that is not there": index({"a": "gone.safetensors"}, "no such file"),
    "a shard that is no name": index({"a": 1}, "is no index of weights"),
    "a list of shards": index(["a"], "is no index of weights"),
    "an index in an index": index('{"weight_map":' + "[" * 100_000, "is no index of weights"),
    "an index of no JSON": index("weights", "is no index of weights"),
    # What is no plain file.
    "nothing": odd(lambda path: path.write_bytes(b""), "or a damaged one"),
    "zeros": odd(lambda path: path.write_bytes(bytes(10**6)), "or a damaged one"),
    "a folder": odd(Path.mkdir, "cannot be read"),
    "a pipe": odd(os.mkfifo, "cannot be read"),
    "a device": odd(lambda path: path.symlink_to("/dev/zero"), "cannot be read"),
    # The text of a config.
    "a number that is none": _config(CONFIG.replace("(1, 2, 3, 6)", "(1.2.3, 2, 3, 6)"), "source=1.2.3: is no number"),
    "grids of a million cells": _config(
        CONFIG.replace("(1, 2, 3, 6)", "(1, 2, 3, 1000000)"), "bins=.*give whole grid sizes"
    ),
    "a mean without end": _config(CONFIG.replace("123.675", "1e999"), "mean=.*give a number for each band"),
}


def make(name: str, folder: Path) -> Path:
    """Write a poison into a new folder."""
    place = folder / name.replace(" ", "-").replace("^", "")
    place.mkdir()
    return POISONS[name].write(Ground(folder=place, state=smp_network().state_dict()))


def play(files: Iterable[str]) -> None:
    """Convert files with little memory and time, and print a line of JSON for each."""
    from jobs.cli import main
    from pipelines.models.converting import ConvertConfig, convert

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, used + HEADROOM))
    for file in files:
        told, output = io.StringIO(), f"{Path(file).parent}/model"
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            code = main(ConvertConfig, convert, ["--source", file, "--output", output])
        print(json.dumps([code, told.getvalue()]), flush=True)


if __name__ == "__main__":
    play(sys.argv[1:])
