"""`.pt` files (`torch.save`) that hold tensors and nothing else, read without running anything that is in them.

PyTorch's own reader does not look at the checksums that its own writer stores: a flipped bit gives another tensor. Here
every part of the file is checked against its CRC-32 before PyTorch sees it.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import TypeAlias

import torch

from dittocache.errors import CacheError, RecordCorruptError, RecordMissingError, StoreUnavailableError

PtValue: TypeAlias = "torch.Tensor | list[PtValue] | dict[str, PtValue]"

_SIGNATURE = b"PK\x03\x04"
_DEEPEST = 20


def pt_bytes(value: PtValue) -> bytes:
    """A `.pt` file of tensors, or of lists and dicts of them, on the CPU, as `torch.load` anywhere reads it.

    Raises CacheError for anything else.
    """
    stream = io.BytesIO()
    torch.save(_on_cpu(value, 0), stream)
    return stream.getvalue()


def read_pt(path: Path) -> PtValue:
    """What a `.pt` file holds: a tensor, or lists and dicts of tensors, on the CPU.

    Raises RecordMissingError when there is no such file, RecordCorruptError when it is torn or a bit of it flipped,
    CacheError when it holds anything but tensors: such a file is refused, nothing in it is executed.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise RecordMissingError(f"{path} does not exist; cache the data set again") from error
    except OSError as error:
        raise StoreUnavailableError(f"{path} cannot be read ({error.strerror or error})") from error
    return parse_pt(content, str(path))


def parse_pt(content: bytes, name: str) -> PtValue:
    """As `read_pt`, from the file's bytes; `name` stands for the file in messages."""
    sizes = _checked_sizes(content, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PyTorch would say of a damaged file; ours to say
        try:
            value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CacheError(
                f"{name} is refused: it holds more than tensors, and a pickle may hold any program. Nothing in it was "
                f"executed ({_first_line(error)}). Remove it and cache again"
            ) from error
        # PyTorch promises no particular exception for a damaged file.
        except Exception as error:
            raise _corrupt(name, _first_line(error)) from error
    return _checked(value, sizes, name, 0)


def _checked_sizes(content: bytes, name: str) -> frozenset[int]:
    """Lengths in bytes of the file's tensors, every part of it checked against its CRC."""
    if not content.startswith(_SIGNATURE):
        what = "it is empty" if not content else "it does not begin as a .pt file of PyTorch 1.6 or later does"
        raise _corrupt(name, what)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if len({entry.filename for entry in entries}) != len(entries):
                raise _corrupt(name, "two of its parts have the same name")
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise _corrupt(name, "its parts are compressed, which PyTorch never does")
                archive.read(entry)
    except (
        zipfile.BadZipFile,
        ValueError,
        NotImplementedError,
        RuntimeError,
        EOFError,
        OSError,
        OverflowError,
    ) as error:
        raise _corrupt(name, str(error)) from error
    return frozenset(entry.file_size for entry in entries if "/data/" in entry.filename)


def _checked(value: object, sizes: frozenset[int], name: str, depth: int) -> PtValue:
    """The value, once it is known to be made of plain tensors only."""
    if isinstance(value, torch.Tensor):
        plain = value.layout == torch.strided and not value.is_quantized and value.device.type == "cpu"
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or not plain:
            raise CacheError(f"{name} is refused: it holds a {type(value).__name__} that is no plain tensor")
        stored = value.untyped_storage().nbytes()
        if stored not in sizes | {0}:
            raise _corrupt(name, f"a tensor claims {stored} bytes that the file does not have")
        return value.detach()
    if depth < _DEEPEST and type(value) in (list, tuple):
        return [_checked(one, sizes, name, depth + 1) for one in value]  # type: ignore[attr-defined]
    if depth < _DEEPEST and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _checked(one, sizes, name, depth + 1) for key, one in value.items()}
    raise CacheError(
        f"{name} is refused: it holds a {type(value).__name__}; expected a tensor, or lists and dicts of tensors. "
        "Remove it and cache again"
    )


def _on_cpu(value: object, depth: int) -> PtValue:
    if isinstance(value, torch.Tensor):
        # A view would be saved with all of the tensor that it is part of.
        return value.detach().to("cpu", copy=True).contiguous().clone()
    if depth < _DEEPEST and isinstance(value, list | tuple):
        return [_on_cpu(one, depth + 1) for one in value]
    if depth < _DEEPEST and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _on_cpu(one, depth + 1) for key, one in value.items()}
    raise CacheError(f"a {type(value).__name__} cannot be saved; expected a tensor, or lists and dicts of tensors")


def _corrupt(name: str, what: str) -> RecordCorruptError:
    return RecordCorruptError(f"{name} is torn or damaged ({what}); remove it and cache again")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
