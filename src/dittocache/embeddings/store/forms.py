"""The forms in which a tensor is stored, and the way back to the encoder's dtype and rows.

    native      the encoder's own dtype; lossless
    float16     half the bytes of a float32 tensor; a relative error of at most 2^-11
    fp8         e4m3 with one float32 scale per token; half the bytes of bfloat16, about 2.6 % relative error
    rows        only those rows that differ from another record's, the base; lossless on top of any form above

A recipe's `storage` asks for a form, and so a tensor in another form has another key. A tensor that a form would ruin
is stored in its own dtype, and the record says so: a few bytes are lost, and never a picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from xxhash import xxh3_64_hexdigest

from dittocache.embeddings.store.storage import FP8_FORM, ReadBase, base_key_of
from dittocache.errors import CacheError, RecordCorruptError

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
FLOAT16_LARGEST = 65_504.0
SCALE, ROWS = "scale", "rows"  # companions: `NAME.scale` and `NAME.rows` beside the tensor `NAME`
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_ROWS_AT_ONCE = 32  # what they take stays in the processor's cache
_NO_BIT_14 = ~(1 << 14)  # where the shift leaves a copy of the sign
_WIDE = (torch.float32, torch.float64)
_FLOATS = (*_WIDE, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Stored:
    """A tensor in the form in which a record holds it.

    Attributes:
        main: the tensor, or what is left of it.
        companions: by suffix: `scale` (float32, one per row of `main`), `rows` (int32, where `main`'s rows belong).
        restored_dtype, restored_shape: of the tensor as the encoder made it.
        restored_digest: xxh3_64 of the restored bytes, where they depend on a base record.
        native_because: why the form that was asked for was not used; empty where it was.
    """

    main: torch.Tensor
    companions: Mapping[str, torch.Tensor]
    restored_dtype: torch.dtype
    restored_shape: tuple[int, ...]
    restored_digest: str | None = None
    native_because: str = ""


def to_stored(tensor: torch.Tensor, recipe: Mapping[str, Any], read_base: ReadBase | None = None) -> Stored:
    """The tensor, contiguous and on the CPU, in the form that its recipe asks for.

    A form that does not fit is not used: float16 for what is no wider, or for values beyond 65,504; fp8 for what has no
    rows, or for values that are not finite. Rows are stored in full where the base cannot be read or shares none.

    Raises CacheError for a form that this version does not know.
    """
    field = recipe.get("storage") or {}
    form = field.get("dtype")
    if form == "float16":
        stored = _to_float16(tensor)
    elif form == FP8_FORM:
        stored = _to_fp8(tensor)
    elif form is None:
        stored = _native(tensor)
    else:
        raise CacheError(f"storage.dtype of a recipe is {form!r}; expected float16 or {FP8_FORM}: upgrade dittocache")
    base_key = base_key_of(recipe)
    if base_key is None or read_base is None or tensor.ndim < 2:
        return stored
    try:
        base = read_base(base_key)
    except CacheError:
        return stored  # a whole record is right in any case; only bytes are lost
    return _without_shared_rows(stored, base)


def to_restored(stored: Stored, base: torch.Tensor | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor in the encoder's dtype and rows; without `out` it may share memory with `stored.main`.

    Args:
        base: the restored tensor of the base record; needed when `stored` has `rows`.
        out: of the restored dtype and shape: the result is written there.

    Raises RecordCorruptError when the parts do not fit each other, or the base is not the one that it was stored with;
    the content of `out` is unspecified then.
    """
    rows = stored.companions.get(ROWS)
    if rows is None:
        if tuple(stored.main.shape) != stored.restored_shape:
            raise RecordCorruptError(
                f"the record's tensor has shape {list(stored.main.shape)}; expected {list(stored.restored_shape)}"
            )
        return _values(stored, out)
    if base is None:
        raise RecordCorruptError("the record holds some rows only, and no base record was given to fill the others")
    return _filled(stored, _values(stored), rows, base, out)


def _native(tensor: torch.Tensor, because: str = "") -> Stored:
    return Stored(tensor, {}, tensor.dtype, tuple(tensor.shape), native_because=because)


def _to_float16(tensor: torch.Tensor) -> Stored:
    if tensor.dtype not in _WIDE:
        return _native(tensor)  # two bytes or fewer already: float16 would save nothing
    largest = _largest(tensor) if tensor.numel() else 0.0
    if not largest <= FLOAT16_LARGEST:  # NaN is not, either
        return _native(tensor, f"float16 ends at {FLOAT16_LARGEST:.0f}, a value is {largest:.6g}")
    return Stored(tensor.to(torch.float16), {}, tensor.dtype, tuple(tensor.shape))


def _to_fp8(tensor: torch.Tensor) -> Stored:
    if tensor.dtype not in _FLOATS or tensor.ndim < 2 or tensor.numel() == 0:
        return _native(tensor)
    values = tensor.float()
    scale = (values.abs().amax(dim=-1) / FP8_LARGEST).clamp_min(_SMALLEST_SCALE)  # (..., tokens)
    if not bool(torch.isfinite(scale * (FP8_LARGEST * 2)).all()):
        return _native(tensor, f"fp8 needs finite values of float32's range, a value is {_largest(tensor):.6g}")
    quantized = (values / scale.unsqueeze(-1)).to(FP8)
    return Stored(quantized, {SCALE: scale}, tensor.dtype, tuple(tensor.shape))


def _largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item()


def _without_shared_rows(stored: Stored, base: torch.Tensor) -> Stored:
    """Leave out the rows that, once restored, have the base's bits: equal rows stay equal in every form."""
    restored = to_restored(stored)
    if base.dtype != restored.dtype or base.shape[1:] != restored.shape[1:] or base.ndim != restored.ndim:
        return stored
    common = min(len(base), len(restored))
    differs = torch.ones(len(restored), dtype=torch.bool)
    differs[:common] = torch.from_numpy((_row_bits(restored[:common]) != _row_bits(base[:common])).any(axis=1))
    rows = differs.nonzero().flatten()
    if len(rows) == len(restored):
        return stored
    return Stored(
        main=_bits(stored.main)[rows].view(stored.main.dtype),
        companions={
            **{suffix: part[rows] for suffix, part in stored.companions.items()},
            ROWS: rows.to(torch.int32),
        },
        restored_dtype=stored.restored_dtype,
        restored_shape=stored.restored_shape,
        restored_digest=_digest(restored),
        native_because=stored.native_because,
    )


def _values(stored: Stored, out: torch.Tensor | None = None) -> torch.Tensor:
    """The stored rows in the encoder's dtype."""
    scale = stored.companions.get(SCALE)
    if scale is None:
        if stored.main.dtype == stored.restored_dtype:
            return stored.main if out is None else out.copy_(stored.main)
        if (stored.main.dtype, stored.restored_dtype) not in {(torch.float16, wide) for wide in _WIDE}:
            raise RecordCorruptError(f"a {stored.main.dtype} tensor cannot be restored to {stored.restored_dtype}")
        return stored.main.to(stored.restored_dtype) if out is None else out.copy_(stored.main)
    fits = scale.dtype == torch.float32 and stored.main.ndim >= 2 and scale.shape == stored.main.shape[:-1]
    if stored.main.dtype != FP8 or stored.restored_dtype not in _FLOATS or not fits:
        raise RecordCorruptError(
            f"the scale, {scale.dtype} of shape {list(scale.shape)}, does not belong to a tensor of "
            f"{stored.main.dtype} and shape {list(stored.main.shape)} that restores to {stored.restored_dtype}"
        )
    restored = torch.empty(stored.main.shape, dtype=stored.restored_dtype) if out is None else out
    return _dequantized_into(restored, stored.main, scale)


def _dequantized_into(restored: torch.Tensor, main: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`main * scale` in float32, then the dtype of `restored`; seven times as fast as torch converts fp8 on a CPU.

    The bits of e4m3, shifted, are those of a float16 that is 256 times smaller, subnormal numbers included. Only its
    NaN is not; no record holds one.
    """
    bits = main.view(torch.int8)
    for begin in range(0, len(main), _ROWS_AT_ONCE):
        few = slice(begin, begin + _ROWS_AT_ONCE)
        half = bits[few].to(torch.int16).bitwise_left_shift_(7).bitwise_and_(_NO_BIT_14).view(torch.float16)
        restored[few] = half.float().mul_(256.0).mul_(scale[few].unsqueeze(-1))
    return restored


def _filled(
    stored: Stored, values: torch.Tensor, rows: torch.Tensor, base: torch.Tensor, out: torch.Tensor | None
) -> torch.Tensor:
    """The base's rows with the stored ones in their places."""
    shape = stored.restored_shape
    if len(shape) < 2 or rows.dtype != torch.int32 or rows.shape != values.shape[:1] or values.shape[1:] != shape[1:]:
        raise RecordCorruptError(
            f"rows of shape {list(rows.shape)} do not place a tensor of shape {list(values.shape)} in {list(shape)}"
        )
    count = shape[0]
    places = rows.long()
    ascending = bool((places[1:] > places[:-1]).all())
    if len(places) and not (ascending and int(places[0]) >= 0 and int(places[-1]) < count):
        raise RecordCorruptError(f"the record's row numbers do not ascend within 0..{count - 1}")
    common = min(count, len(base) if base.ndim else 0)
    if base.dtype != values.dtype or base.shape[1:] != shape[1:] or int((places >= common).sum()) != count - common:
        raise _other_base(f"it has {base.dtype} and shape {list(base.shape)}")
    restored = torch.empty(shape, dtype=values.dtype) if out is None else out
    restored[:common] = base[:common]
    _bits(restored)[places] = _bits(values)
    if _digest(restored) != stored.restored_digest:
        raise _other_base("its rows are others")
    return restored


def _other_base(found: str) -> RecordCorruptError:
    return RecordCorruptError(f"the base record is not the one that this record was stored with: {found}")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: NaN equals itself, and every dtype can be indexed."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def _row_bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """`(rows, words)` in words as wide as a row allows."""
    width = tensor[:1].nbytes
    content = tensor.reshape(-1).view(torch.uint8).reshape(len(tensor), width).numpy()
    return content.view(np.uint64) if width % 8 == 0 else content


def _digest(tensor: torch.Tensor) -> str:
    return xxh3_64_hexdigest(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
