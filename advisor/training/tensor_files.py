"""safetensors files, read and written a piece at a time.

The library maps whole files into memory, and mapped pages count as the process's own. Here no more than what is asked
for is ever read. Format: eight bytes of length (little endian), a JSON header, then the tensors' bytes.
Source: github.com/huggingface/safetensors, README (Format).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from types import TracebackType
from typing import TYPE_CHECKING, Any

from advisor.errors import InputError

if TYPE_CHECKING:
    import torch

FLOATING: Mapping[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The formats that arithmetic is done on, as safetensors and as torch spell them."""

SHARD_BYTES = 2 * 10**9
"""Largest file of a whole model. safetensors copies all tensors of a file from the device before it writes the first
byte, so this much host RAM is enough for a model of any size."""

_LARGEST_HEADER_BYTES = 100 * 10**6
"""The library's own limit."""

_CUT_OFF = "It may be cut off or still downloading: fetch it again."


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor is."""

    path: str
    name: str
    dtype: str
    """As safetensors spells it: BF16."""

    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""

    size_bytes: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def itemsize(self) -> int:
        """Bytes a number."""
        return self.size_bytes // self.elements if self.elements else 0


def read_header(path: str) -> tuple[StoredTensor, ...]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        InputError: no such file, or not a whole safetensors file.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _LARGEST_HEADER_BYTES:
                raise InputError(f"{path} is not a safetensors file.", hint=_CUT_OFF)
            header = json.loads(file.read(length))
            whole = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path} cannot be read.", why=f"{error.strerror}.", hint="Check the path.") from error
    except ValueError as error:
        raise InputError(f"{path} is not a safetensors file.", why=str(error)[:200], hint=_CUT_OFF) from error
    try:
        found = tuple(_tensors(path, header, data=8 + length, whole=whole))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a whole safetensors file.", why=str(error)[:200], hint=_CUT_OFF) from error
    return tuple(sorted(found, key=lambda tensor: (tensor.start, tensor.name)))


def _tensors(path: str, header: Mapping[str, Any], *, data: int, whole: int) -> Iterator[StoredTensor]:
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        tensor = StoredTensor(
            path=path,
            name=name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            start=data + start,
            size_bytes=end - start,
        )
        if not 0 <= start <= end or data + end > whole:
            raise ValueError(f"{name} ends after the file does")
        if tensor.dtype in FLOATING and tensor.size_bytes != tensor.elements * _ITEMSIZE[tensor.dtype]:
            raise ValueError(f"{name} has another size than its shape says")
        yield tensor


_ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def stored_as(dtype: str) -> str:
    """torch's name of a floating format → that of safetensors: bfloat16 → BF16."""
    return {torch_name: name for name, torch_name in FLOATING.items()}[dtype]


def read_elements(file: BufferedReader, tensor: StoredTensor, first: int, count: int) -> torch.Tensor:
    """`count` elements of a floating tensor from number `first` on, as one row, in memory of their own."""
    import torch

    raw = torch.empty(count * tensor.itemsize, dtype=torch.uint8)
    file.seek(tensor.start + first * tensor.itemsize)
    if file.readinto(raw.numpy().data) != raw.numel():
        raise InputError(f"{tensor.path} ends in the middle of {tensor.name}.", hint=_CUT_OFF)
    values: torch.Tensor = raw.view(getattr(torch, FLOATING[tensor.dtype]))
    return values


class TensorWriter:
    """A safetensors file whose tensors' bytes are written in order, as they come."""

    def __init__(self, path: str, tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> None:
        """Starts the file with the header for (name, dtype, shape, bytes) of every tensor."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype, shape, size_bytes in tensors:
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size_bytes]}
            end += size_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._end = 8 + len(text) + end
        self._file = open(path, "xb")  # noqa: SIM115 - closed by __exit__
        self._file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> TensorWriter:
        return self

    def write(self, values: torch.Tensor) -> None:
        """The next elements."""
        import torch

        self._file.write(values.contiguous().view(-1).view(torch.uint8).numpy().data)

    def write_bytes(self, raw: bytes) -> None:
        """The next bytes, whatever they are."""
        self._file.write(raw)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits until the bytes are on the disk; their number is what the header promised."""
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                written = self._file.tell()
                if written != self._end:
                    raise AssertionError(f"{written} bytes were written and {self._end} promised")
        finally:
            self._file.close()


__all__ = ["FLOATING", "SHARD_BYTES", "StoredTensor", "TensorWriter", "read_elements", "read_header", "stored_as"]
