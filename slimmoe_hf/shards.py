"""Safetensors files one tensor at a time: read parts of them, write new ones of bounded size, whole or not at all.

safetensors maps a file to read it, which counts a whole shard as this process's memory and cannot be told what to read
ahead. Here a read asks for exactly the bytes it wants.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "U16": torch.uint16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_AGAIN = "Fetch it again."


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        name: Its name. file: The file's name.
        dtype: As safetensors writes it (`BF16`, ...). shape: Its sizes.
        begin, end: Where its bytes are in the file.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.end - self.begin


def read_header(file: Path) -> dict[str, Stored]:
    """What a safetensors file holds, by name, after checking that the file is long enough for all of it.

    Raises:
        ValueError: Truncated, no safetensors file, or a tensor whose bytes are not what its shape needs.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file}: truncated: {size} bytes, not even its header is whole. {_AGAIN}")
        header = stream.read(length)
    return parse_header(header, str(file), size)


def parse_header(header: bytes, file: str, size: int | None = None) -> dict[str, Stored]:
    """Read the JSON at the start of a safetensors file.

    Args:
        header: Without the eight bytes of its length.
        file: Where it comes from.
        size: Of the whole file; None where it is not known yet.

    Raises:
        ValueError: As `read_header`.
    """
    try:
        content: dict[str, Any] = json.loads(header)
        content.pop("__metadata__", None)
        start = 8 + len(header)
        found = [
            Stored(name, Path(file).name, str(entry["dtype"]), tuple(map(int, entry["shape"])),
                   start + int(entry["data_offsets"][0]), start + int(entry["data_offsets"][1]))
            for name, entry in content.items()
        ]  # fmt: skip
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError):
        raise ValueError(f"{file}: not a safetensors file (its header is not JSON of the right form).") from None
    free = start
    for tensor in sorted(found, key=lambda each: each.begin):
        if tensor.begin < free or tensor.end < tensor.begin:
            raise ValueError(f"{file}: {tensor.name} lies over another tensor, or over the header. {_AGAIN}")
        free = tensor.end
        if size is not None and tensor.end > size:
            raise ValueError(
                f"{file}: truncated at {tensor.name}: it ends at byte {tensor.end}, the file has {size}. {_AGAIN}"
            )
        dtype = DTYPES.get(tensor.dtype)
        if (dtype is not None and math.prod(tensor.shape) * dtype.itemsize != tensor.bytes) or tensor.begin < start:
            raise ValueError(
                f"{file}: {tensor.name} has {tensor.bytes} bytes, not what its shape {list(tensor.shape)} needs."
            )
    return {tensor.name: tensor for tensor in found}


class Buffer:
    """Memory to read into that is used again and again: fresh pages cost more than the reading."""

    def __init__(self) -> None:
        """Start with none."""
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """So many bytes; what was read into them before is lost."""
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size]


def read_tensor(
    folder: Path, stored: Stored, first: int = 0, shape: Sequence[int] | None = None, buffer: Buffer | None = None
) -> Tensor:
    """Read a tensor, or a contiguous part of one.

    Args:
        folder: Where its file is.
        stored: From `read_header`.
        first: Element that the part starts at. shape: Of the part; None is the whole tensor.
        buffer: Read into it; the tensor is good until the next read. None reads into memory of its own.

    Raises:
        ValueError: The file is shorter than its header says, or of a dtype that torch has not.
    """
    if stored.dtype not in DTYPES:
        raise ValueError(f"{folder / stored.file}: {stored.name} has the dtype {stored.dtype}, which is not read here.")
    dtype = DTYPES[stored.dtype]
    shape = stored.shape if shape is None else shape
    wanted = math.prod(shape) * dtype.itemsize
    memory = torch.empty(wanted, dtype=torch.uint8) if buffer is None else buffer.take(wanted)
    with (folder / stored.file).open("rb", buffering=0) as stream:
        stream.seek(stored.begin + first * dtype.itemsize)
        view, done = _bytes_of(memory), 0
        while done < wanted:
            got = stream.readinto(view[done : done + (1 << 26)])
            if not got:
                raise ValueError(f"{folder / stored.file}: truncated at {stored.name}. {_AGAIN}")
            done += got
    return memory.view(dtype).view(*shape)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor of bytes."""
    array: Any = tensor.numpy()
    return memoryview(array)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor of floats holds neither NaN nor infinity."""
    if tensor.dtype in (torch.bfloat16, torch.float16):  # by their exponent bits: five times as fast as isfinite
        exponent = 0x7F80 if tensor.dtype == torch.bfloat16 else 0x7C00
        bits = tensor.contiguous().view(torch.int16) & 0x7FFF
        return tensor.numel() == 0 or int(bits.max()) < exponent
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())


class ShardWriter:
    """Writes one safetensors file, tensor by tensor in the order announced, and hashes it on the way.

    The file has a name of its own until `close`, so that what has its final name is whole.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> None:
        """Begin the file.

        Args:
            path: Its final place.
            tensors: Name -> dtype and shape, in the order in which they will come.
        """
        self.path = path
        self._partial = path.with_name(f"{path.name}.tmp")
        self._expected: Iterator[tuple[str, tuple[torch.dtype, Sequence[int]]]] = iter(tensors.items())
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            end = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._digest = hashlib.sha256()
        self._stream = self._partial.open("wb", buffering=0)
        self._write(memoryview(len(text).to_bytes(8, "little") + text))

    def add(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor."""
        expected, (dtype, shape) = next(self._expected)
        assert (name, tensor.dtype, list(tensor.shape)) == (expected, dtype, list(shape)), (name, expected)
        self._write(_bytes_of(tensor.contiguous().flatten().view(torch.uint8)))

    def close(self) -> str:
        """Have the file reach the disk under its final name. Returns its SHA-256."""
        assert next(self._expected, None) is None
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._partial.replace(self.path)
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._stream.close()
        self._partial.unlink(missing_ok=True)

    def _write(self, content: memoryview) -> None:
        self._digest.update(content)
        while content:
            content = content[write(self._stream.fileno(), content) :]


write = os.write
"""How bytes reach a file: in one place, so that a test can fill the disk."""
