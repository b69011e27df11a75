"""Tensors in safetensors files: read chunk by chunk, and written header first, in any order."""

import contextlib
import errno
import json
import math
import os
import reprlib
import shutil
import struct
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from koinon.core import UserError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WORDS = {dtype: word for word, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000
"""Bytes; the reference reader's limit too."""
AHEAD = 16 << 20
"""Bytes of a file that the disk reads ahead of what is asked for."""
BEHIND = 4 << 20
"""Bytes after which what was written starts on its way to the disk."""


@dataclass(frozen=True)
class Spec:
    """What a tensor is, without its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * self.dtype.itemsize


class Weights(Protocol):
    """Named tensors, wherever they are: read a stretch at a time."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Every tensor's kind, in the order in which they are stored."""
        ...

    def read(self, name: str, start: int, stop: int) -> Shaped[Tensor, " n"]:
        """The elements from ``start`` to ``stop`` of a tensor laid out flat; to be read only, not changed."""
        ...


class TensorFile:
    """One safetensors file, of which only what is asked for is read.

    Args:
        path: the file.

    Raises:
        UserError: missing, truncated, or with a header that does not describe it.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():  # opening a pipe would wait for ever
            raise UserError(f"{path}: cannot be read (no such file)")
        try:
            with path.open("rb") as file:
                self._handle = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._handle)
                size = os.fstat(self._handle).st_size
                header, start = _read_header(file, size)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise UserError(f"{path}: damaged, or not a safetensors file ({error})") from None
        self.specs: dict[str, Spec] = {}
        self._starts: dict[str, int] = {}
        self._ahead = 0
        try:
            self.metadata = _words(header.pop("__metadata__", None))
            for name, (spec, offset) in _layout(header, size - start).items():
                self.specs[name], self._starts[name] = spec, start + offset
        except ValueError as error:
            raise UserError(f"{path}: damaged, or not a safetensors file ({error})") from None

    def read(self, name: str, start: int, stop: int) -> Shaped[Tensor, " n"]:
        """See `Weights.read`."""
        spec = self.specs[name]
        if start >= stop:
            return torch.empty(0, dtype=spec.dtype)
        place = self._starts[name] + start * spec.dtype.itemsize
        # Not mapped: a page that is not in memory yet would cost a fault of its own, and a file cut meanwhile a crash.
        found = np.empty((stop - start) * spec.dtype.itemsize, np.uint8)
        self._expect(place, len(found))
        data = found.data
        try:
            while data:
                got = os.preadv(self._handle, [data], place)
                if not got:
                    raise UserError(f"{self.path}: cannot be read (it has become shorter)")
                data, place = data[got:], place + got
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        return torch.from_numpy(found).view(spec.dtype)

    def _expect(self, place: int, size: int) -> None:
        """Have the disk go on reading: what follows is asked for next."""
        end = place + size + AHEAD
        # Workers read side by side: one that is behind another finds its part read already.
        start = min(self._ahead, end) if place <= self._ahead <= end + AHEAD else place
        if end - start >= AHEAD // 2 and hasattr(os, "posix_fadvise"):
            self._ahead = end
            with contextlib.suppress(OSError):  # a hint
                os.posix_fadvise(self._handle, start, end - start, os.POSIX_FADV_WILLNEED)


def _read_header(file: Any, size: int) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors start; raises ValueError if it is damaged."""
    first = file.read(8)
    if len(first) < 8:
        raise ValueError(f"{size} bytes are no header")
    (length,) = struct.unpack("<Q", first)
    if length > min(HEADER_LIMIT, size - 8):
        raise ValueError(f"its header would be {length:,} bytes of {size:,}")
    try:
        text = file.read(length).decode("utf-8")
        header = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header, 8 + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header names something twice")
    return found


def _no_number(word: str) -> float:
    raise ValueError(f"its header holds {word}")


def _words(found: Any) -> Mapping[str, str]:
    """The metadata of a header: words to words."""
    if found is None:
        return {}
    if not (isinstance(found, dict) and all(isinstance(value, str) for value in found.values())):
        raise ValueError("its metadata are no words by name")
    return found


def _layout(header: Mapping[str, Any], room: int) -> dict[str, tuple[Spec, int]]:
    """Each tensor's kind and offset; they lie side by side and fill the file, or ValueError."""
    found = {}
    for name, entry in header.items():
        name.encode("utf-8")  # half a character, written as an escape, can be read but not be written again
        kind = entry.get("dtype") if isinstance(entry, dict) else None
        if not (isinstance(entry, dict) and isinstance(kind, str) and kind in DTYPES):
            raise ValueError(f"tensor {reprlib.repr(name)} is of the unknown kind {reprlib.repr(kind)}")
        shape, offsets = entry.get("shape", ()), entry.get("data_offsets", ())
        for what in (shape, offsets):
            if not (isinstance(what, list) and all(type(n) is int and 0 <= n < 2**63 for n in what)):
                raise ValueError(f"tensor {reprlib.repr(name)} has no valid shape or place")
        if len(offsets) != 2 or len(shape) > 64:
            raise ValueError(f"tensor {reprlib.repr(name)} has no valid shape or place")
        spec = Spec(tuple(shape), DTYPES[kind])
        size, room_taken = spec.size, offsets[1] - offsets[0]
        if size >= 2**63:
            raise ValueError(f"tensor {reprlib.repr(name)} has a shape that fits into no file")
        if room_taken != size:
            raise ValueError(f"tensor {reprlib.repr(name)} has {room_taken:,} bytes, its shape asks for {size:,}")
        found[name] = (spec, offsets[0])
    end = 0
    for name, (spec, offset) in sorted(found.items(), key=lambda item: (item[1][1], item[1][0].size)):
        if offset != end:
            raise ValueError(f"tensor {reprlib.repr(name)} starts at {offset:,}, the one before it ends at {end:,}")
        end += spec.size
    if end != room:
        raise ValueError(f"its tensors take {end:,} bytes, there are {room:,}: truncated?")
    return dict(sorted(found.items(), key=lambda item: item[1][1]))


class TensorWriter:
    """Safetensors files in a folder, whose headers are written first, so that tensors can come in any order.

    Args:
        folder: where the files are made; it exists.
        specs: every tensor, in the order of the files.
        shard: most bytes of tensors in one file, unless a single tensor is larger.
        stem: of the files' names.
        fresh: make the files new; otherwise they are there from a run that was stopped.
        metadata: words kept in each header.

    Raises:
        UserError: there is no room for them, or they cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, Spec],
        shard: int,
        stem: str = "model",
        fresh: bool = True,
        metadata: Mapping[str, str] | None = None,
    ):
        self.folder, self.specs, self.stem = folder, specs, stem
        shards = list(_shards(specs, shard))
        width = len(shards)
        self.files = [
            f"{stem}.safetensors" if width == 1 else f"{stem}-{i:05d}-of-{width:05d}.safetensors"
            for i in range(1, width + 1)
        ]
        self._handles: list[int] = []
        self._places: dict[str, tuple[int, int]] = {}
        self.file_of: dict[str, str] = {}
        _check_room(folder, sum(spec.size for spec in specs.values()) if fresh else 0)
        try:
            for file, names in zip(self.files, shards, strict=True):
                header, starts, end = _header({name: specs[name] for name in names}, metadata or {"format": "pt"})
                handle = os.open(folder / file, os.O_RDWR | os.O_CREAT, 0o644)
                self._handles.append(handle)
                if fresh:
                    os.pwrite(handle, header, 0)
                    _reserve(handle, end)
                for name in names:
                    self._places[name], self.file_of[name] = (handle, starts[name]), file
        except OSError as error:
            self.abandon()
            raise _unwritable(folder, error) from None

    def write(self, name: str, start: int, values: Shaped[Tensor, " n"]) -> None:
        """Put a stretch of a tensor, laid out flat, in its place; from any thread."""
        handle, place = self._places[name]
        data = values.contiguous().view(torch.uint8).numpy().data
        first = at = place + start * self.specs[name].dtype.itemsize
        try:
            while data:
                written = os.pwrite(handle, data, at)
                data, at = data[written:], at + written
        except OSError as error:
            raise _unwritable(self.folder, error) from None
        end = at // BEHIND * BEHIND
        if end > first:
            _send(handle, end - 2 * BEHIND, end)

    def sync(self) -> None:
        """Have everything written so far on the disk."""
        for handle in self._handles:
            os.fsync(handle)

    def abandon(self) -> None:
        """Close the files as they are."""
        for handle in self._handles:
            os.close(handle)
        self._handles = []

    def finish(self) -> None:
        """Close the files and, if there are several, write the index that Hugging Face reads."""
        self.sync()
        self.abandon()
        if len(self.files) > 1:
            total = sum(spec.size for spec in self.specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": self.file_of}
            text = json.dumps(index, indent=1)
            (self.folder / f"{self.stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(specs: Mapping[str, Spec], limit: int) -> Iterable[list[str]]:
    names: list[str] = []
    size = 0
    for name, spec in specs.items():
        if names and size + spec.size > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += spec.size
    yield names


def _header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The file's first bytes, where each tensor starts in the file, and where the file ends."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset, offsets = 0, {}
    for name in sorted(specs, key=lambda name: -specs[name].dtype.itemsize):  # so that every one is aligned
        spec = specs[name]
        offsets[name] = offset
        entries[name] = {
            "dtype": WORDS[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.size],
        }
        offset += spec.size
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: first + at for name, at in offsets.items()}, first + offset


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"{folder}: {size / 1e6:,.1f} MB are to be written, the disk has {free / 1e6:,.1f} MB left")


def _reserve(handle: int, size: int) -> None:
    """Take the room now, so that a full disk is told before the work instead of after it."""
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # a file system that cannot
                raise
    return os.ftruncate(handle, size)


def _send(handle: int, start: int, end: int) -> None:
    """Have the disk start to write a stretch of a file, so that the end need not wait for all of it."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # a hint: on Linux, to forget what is not on the disk yet starts to write it
            os.posix_fadvise(handle, max(0, start), end - max(0, start), os.POSIX_FADV_DONTNEED)


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder}: cannot be written ({error.strerror or error})")
