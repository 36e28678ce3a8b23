"""Stored forms: what comes back has the encoder's dtype and rows, within the error that its form promises."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from dittocache.embeddings.recipe import recipe_key
from dittocache.embeddings.store.forms import Stored, to_restored
from dittocache.embeddings.store.record import DTYPES, pack, parse_header, unpack
from dittocache.embeddings.store.storage import Storage, storage_error, storage_field
from dittocache.embeddings.store.store import Store
from dittocache.errors import CacheError, RecordCorruptError, RecordMissingError

FP8 = {"dtype": "fp8_e4m3_token"}
FLOAT16 = {"dtype": "float16"}


def recipe(storage: dict[str, Any] | None = None, artifact: str = "prompt_embeds") -> dict[str, Any]:
    made: dict[str, Any] = {"artifact": artifact, "schema": 1}
    return made if storage is None else {**made, "storage": storage}


def through_record(tensor: torch.Tensor, storage: dict[str, Any] | None) -> torch.Tensor:
    made = recipe(storage)
    return unpack(bytearray(pack(recipe_key(made), tensor, made)), recipe_key(made))


def provenance_of(tensor: torch.Tensor, storage: dict[str, Any]) -> dict[str, Any]:
    content = pack(recipe_key(recipe(storage)), tensor, recipe(storage))
    return parse_header(content, len(content)).provenance


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def heavy_tailed(tokens: int = 160, width: int = 256, seed: int = 0) -> torch.Tensor:
    """Like hidden states of a language model: tokens of very different size, a few channels far above the others."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, width, generator=generator)
    values /= torch.rand(tokens, 1, generator=generator).clamp_min(0.02)  # a power-law tail over tokens
    values *= torch.exp(0.5 * torch.randn(width, generator=generator))
    values[:, torch.randperm(width, generator=generator)[:4]] *= torch.tensor([300.0, 150.0, 80.0, 40.0])
    return values.to(torch.bfloat16)


def test_a_form_is_asked_for_where_it_makes_sense_only() -> None:
    native, half, fp8 = Storage(), Storage("float16"), Storage("fp8", shared_prefix=True)
    assert storage_field("prompt_embeds", native, "ab") is None
    assert storage_field("image_latents", half, None) == FLOAT16
    assert storage_field("prompt_embeds_mask", half, None) is storage_field("img_shapes", half, None) is None
    assert storage_field("empty_prompt_embeds", fp8, "ab") == FP8
    assert storage_field("prompt_embeds", fp8, "ab") == {**FP8, "rows_shared_with": "ab"}
    assert storage_field("prompt_embeds", fp8, None) == FP8
    for artifact in ("image_latents", "pooled_prompt_embeds", "prompt_embeds_mask"):
        assert storage_field(artifact, fp8, "ab") is None


def test_every_form_has_a_key_of_its_own() -> None:
    fields = [
        storage_field("prompt_embeds", Storage(dtype, shared), base)
        for dtype in ("native", "float16", "fp8")
        for shared, base in ((False, None), (True, "ab"), (True, "cd"))
    ]
    assert len({recipe_key(recipe(field)) for field in fields}) == len(fields)


def test_fp8_stays_within_its_error_on_heavy_tails() -> None:
    original = heavy_tailed()
    restored = through_record(original, FP8)
    assert restored.dtype == original.dtype and restored.shape == original.shape
    error = storage_error(original, restored)
    assert 0.005 < error.relative_rms < 0.04
    assert 0.998 < error.worst_token_cosine < 1
    unscaled = original.to(torch.float8_e4m3fn).to(original.dtype).nan_to_num(448.0)
    assert storage_error(original, unscaled).relative_rms > 10 * error.relative_rms


def test_fp8_halves_a_record_and_any_reader_restores_it() -> None:
    original = heavy_tailed(64, 1024)
    content = pack(recipe_key(recipe(FP8)), original, recipe(FP8))
    assert len(content) < 0.52 * original.nbytes
    tensors = load(content)
    assert set(tensors) == {"prompt_embeds", "prompt_embeds.scale"}
    assert tensors["prompt_embeds"].dtype == torch.float8_e4m3fn and tensors["prompt_embeds.scale"].shape == (64,)
    by_hand = (tensors["prompt_embeds"].float() * tensors["prompt_embeds.scale"][:, None]).to(torch.bfloat16)
    assert same_bits(by_hand, through_record(original, FP8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_fp8_can_hold_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes[codes & 0x7F != 0x7F].view(torch.float8_e4m3fn).to(dtype)  # every number of e4m3, both signs
    original = torch.stack([values, values * 4, torch.zeros_like(values), -torch.zeros_like(values)])
    assert same_bits(through_record(original, FP8), original)


@pytest.mark.parametrize("largest", [1e-45, 1e-38, 6e4, 3e38])
def test_rows_of_any_magnitude_stay_finite_in_fp8(largest: float) -> None:
    original = torch.tensor([[largest, -largest / 2, 0.0], [1.0, 2.0, 3.0]])
    restored = through_record(original, FP8)
    assert torch.isfinite(restored).all()
    torch.testing.assert_close(restored, original, rtol=0.07, atol=1e-38)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e300])
@pytest.mark.parametrize("storage", [FP8, FLOAT16], ids=["fp8", "float16"])
def test_what_a_form_would_ruin_is_stored_natively_and_said(value: float, storage: dict[str, Any]) -> None:
    original = torch.ones(3, 4, dtype=torch.float64)
    original[1, 2] = value
    assert same_bits(through_record(original, storage), original)
    assert "value is" in provenance_of(original, storage)["stored_native"]


@pytest.mark.parametrize("beyond", [65_520.0, 70_000.0, -1e5])
def test_float16_never_becomes_infinite(beyond: float) -> None:
    original = torch.tensor([[1.0, beyond], [0.1, 65_504.0]])
    assert same_bits(through_record(original, FLOAT16), original)
    assert "65504" in provenance_of(original, FLOAT16)["stored_native"]
    within = original.clamp(-65_504, 65_504)
    assert provenance_of(within, FLOAT16) == {}
    torch.testing.assert_close(through_record(within, FLOAT16), within, rtol=2**-11, atol=0)


def test_float16_halves_float32_and_leaves_narrower_dtypes_alone() -> None:
    original = heavy_tailed(64, 256)
    wide = original.float() / original.float().abs().max()
    assert len(pack(recipe_key(recipe(FLOAT16)), wide, recipe(FLOAT16))) < 0.52 * wide.nbytes
    assert through_record(wide, FLOAT16).dtype == torch.float32
    assert storage_error(wide, through_record(wide, FLOAT16)).relative_rms < 2**-11
    assert same_bits(through_record(original, FLOAT16), original)


@pytest.mark.parametrize("storage", [FP8, FLOAT16, {"rows_shared_with": "0" * 32}], ids=["fp8", "float16", "rows"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_no_dtype_or_shape_is_refused(storage: dict[str, Any], dtype: torch.dtype) -> None:
    for shape in [(), (3,), (0, 4), (4, 0), (2, 3, 4)]:
        tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
        restored = through_record(tensor, storage)
        assert restored.dtype == dtype and restored.shape == tensor.shape
        torch.testing.assert_close(restored.double(), tensor.double(), rtol=0.07, atol=0)


def test_a_form_of_a_newer_version_is_refused() -> None:
    unknown = recipe({"dtype": "fp4"})
    with pytest.raises(CacheError, match="'fp4'; expected float16 or fp8_e4m3_token"):
        pack(recipe_key(unknown), torch.ones(2, 2), unknown)


BASE = recipe(artifact="empty_prompt_embeds")
BASE_KEY = recipe_key(BASE)


def dependent(dtype: dict[str, Any] | None = None) -> dict[str, Any]:
    base = BASE if dtype is None else recipe(dtype, "empty_prompt_embeds")
    return recipe({**(dtype or {}), "rows_shared_with": recipe_key(base)})


def with_tail(base: torch.Tensor, tokens: int, seed: int = 1) -> torch.Tensor:
    """A prompt that begins with the base's rows; one of them differs, and holds a NaN."""
    prompt = torch.cat([base[: len(base) - 2], heavy_tailed(tokens, base.shape[1], seed).to(base.dtype)])
    prompt[3, 1] += 1
    return prompt


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


@pytest.mark.parametrize("tail", [0, 1, 12], ids=lambda tail: f"tail of {tail}")
def test_shared_rows_are_stored_once_and_come_back_bit_for_bit(store: Store, tail: int) -> None:
    base = heavy_tailed()
    base[5, 0], base[6] = math.nan, 0.0
    prompt = with_tail(base, tail)
    prompt[6] = -0.0
    store.write(BASE_KEY, base, BASE)
    key = recipe_key(dependent())
    length = store.write(key, prompt, dependent())
    assert length < 2000 + (tail + 2) * prompt[0].nbytes
    assert same_bits(store.read(key), prompt)
    rows = load(store.fetch(key))["prompt_embeds.rows"]
    assert rows.dtype == torch.int32
    assert set(rows.tolist()) >= {3, 6} and 5 not in rows.tolist(), "-0.0 is not 0.0, a NaN equals itself"


def test_rows_equal_before_quantization_are_shared_in_fp8(store: Store) -> None:
    base = heavy_tailed()
    prompt = with_tail(base, 12)
    empty = recipe(FP8, "empty_prompt_embeds")
    store.write(recipe_key(empty), base, empty)
    made = dependent(FP8)
    store.write(recipe_key(made), prompt, made)
    restored = store.read(recipe_key(made))
    assert same_bits(restored, through_record(prompt, FP8))
    assert same_bits(restored[:3], store.read(recipe_key(empty))[:3])
    stored = load(store.fetch(recipe_key(made)))
    assert len(stored["prompt_embeds.rows"]) == len(stored["prompt_embeds.scale"]) == 12 + 1
    assert stored["prompt_embeds"].dtype == torch.float8_e4m3fn


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 5),
    st.integers(0, 5),
    st.data(),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float8_e4m3fn]),
)
def test_any_two_tensors_share_rows_losslessly(
    base_rows: int, rows: int, data: st.DataObject, dtype: torch.dtype
) -> None:
    width = data.draw(st.sampled_from([0, 1, 3, 8]))
    few = st.sampled_from([0, 1, 0x7F, 0xFF, 0x80])  # among them NaN and -0 of e4m3

    def draw(count: int) -> torch.Tensor:
        size = count * width * dtype.itemsize
        content = data.draw(st.lists(few, min_size=size, max_size=size))
        return torch.tensor(content, dtype=torch.uint8).view(dtype).reshape(count, width)

    base, tensor = draw(base_rows), draw(rows)
    key = recipe_key(dependent())
    content = pack(key, tensor, dependent(), base=lambda _: base)
    assert same_bits(unpack(bytearray(content), key, base=lambda _: base), tensor)


@pytest.mark.parametrize(
    "base", [torch.ones(160, 8).bfloat16(), heavy_tailed().float(), torch.ones(3)], ids=["width", "dtype", "1-D"]
)
def test_a_base_that_does_not_fit_shares_nothing(store: Store, base: torch.Tensor) -> None:
    store.write(BASE_KEY, base, BASE)
    prompt = heavy_tailed()
    store.write(recipe_key(dependent()), prompt, dependent())
    assert same_bits(store.read(recipe_key(dependent())), prompt)


def test_without_its_base_a_record_is_written_whole(store: Store) -> None:
    prompt = heavy_tailed()
    store.write(recipe_key(dependent()), prompt, dependent())
    assert BASE_KEY not in store and same_bits(store.read(recipe_key(dependent())), prompt)


def damage(store: Store, key: str) -> None:
    path = store.root / "objects" / key[:2] / f"{key}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("fault", ["missing", "corrupt"])
def test_a_base_that_cannot_be_read_is_named_with_its_dependent(store: Store, fault: str) -> None:
    base, prompt, key = heavy_tailed(), with_tail(heavy_tailed(), 5), recipe_key(dependent())
    store.write(BASE_KEY, base, BASE)
    store.write(key, prompt, dependent())
    if fault == "missing":
        (store.root / "objects" / BASE_KEY[:2] / f"{BASE_KEY}.safetensors").unlink()
    else:
        damage(store, BASE_KEY)
    with pytest.raises(RecordMissingError, match=f"record {key} shares rows with record {BASE_KEY}.*record {BASE_KEY}"):
        store.read(key)
    assert BASE_KEY not in store and key in store, "only the base is to be encoded again"
    store.write(BASE_KEY, base, BASE)
    assert same_bits(store.read(key), prompt)


def test_a_base_encoded_anew_with_other_bits_is_found(store: Store) -> None:
    base, key = heavy_tailed(), recipe_key(dependent())
    store.write(BASE_KEY, base, BASE)
    store.write(key, with_tail(base, 5), dependent())
    for other in (base * 1.01, base[:4]):
        store.write(BASE_KEY, other, BASE, replace=True)
        with pytest.raises(RecordCorruptError, match=f"record {key}.*not the one that this record was stored with"):
            store.read(key)
        assert key not in store and BASE_KEY in store
        store.write(BASE_KEY, base, BASE, replace=True)
        store.write(key, with_tail(base, 5), dependent())


def test_a_damaged_dependent_goes_into_quarantine(store: Store) -> None:
    key = recipe_key(dependent())
    store.write(BASE_KEY, heavy_tailed(), BASE)
    store.write(key, with_tail(heavy_tailed(), 5), dependent())
    damage(store, key)
    with pytest.raises(RecordCorruptError, match=f"record {key}.*checksum"):
        store.read(key)
    assert key not in store and BASE_KEY in store


def test_provenance_is_kept_and_no_part_of_the_key(store: Store) -> None:
    made = recipe()
    store.write(recipe_key(made), torch.ones(2), made, provenance={"vae_tiling": True, "imported_from": "qflux"})
    assert store.header(recipe_key(made)).provenance == {"vae_tiling": True, "imported_from": "qflux"}
    content = store.fetch(recipe_key(made)).replace(b"qflux", b"qfluX")
    with pytest.raises(RecordCorruptError, match="checksum"):
        unpack(bytearray(content), recipe_key(made))


def test_the_error_is_measured_by_token() -> None:
    original = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    assert storage_error(original, original) == storage_error(torch.zeros(0, 3), torch.zeros(0, 3))
    turned = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    error = storage_error(original, turned)
    assert error.relative_rms == pytest.approx(math.sqrt(2 / 26)) and error.worst_token_cosine == pytest.approx(0.0)
    with pytest.raises(ValueError, match="shapes differ"):
        storage_error(original, turned[:2])


HALF, ROWS = torch.zeros(2, 4, dtype=torch.float16), torch.tensor([0, 2], dtype=torch.int32)
CODES, SCALE = torch.zeros(2, 4).to(torch.float8_e4m3fn), torch.ones(2)


@pytest.mark.parametrize(
    ("main", "companions", "dtype", "shape"),
    [
        (HALF, {}, torch.float16, (4, 2)),
        (HALF, {}, torch.float32, (2, 5)),
        (HALF, {}, torch.bfloat16, (2, 4)),
        (HALF, {}, torch.int32, (2, 4)),
        (HALF, {"scale": SCALE}, torch.float32, (2, 4)),
        (CODES, {"scale": SCALE.double()}, torch.float32, (2, 4)),
        (CODES, {"scale": SCALE[:1]}, torch.float32, (2, 4)),
        (CODES, {"scale": SCALE[:, None]}, torch.float32, (2, 4)),
        (CODES, {"scale": SCALE}, torch.int32, (2, 4)),
        (CODES, {}, torch.float32, (2, 4)),
        (CODES[0], {"scale": SCALE[0]}, torch.float32, (4,)),
        (HALF, {"rows": ROWS[:1]}, torch.float16, (4, 4)),
        (HALF[:1], {"rows": ROWS}, torch.float16, (4, 4)),
        (HALF, {"rows": ROWS.long()}, torch.float16, (4, 4)),
        (HALF, {"rows": ROWS[:, None]}, torch.float16, (4, 4)),
        (HALF, {"rows": ROWS}, torch.float16, (4, 5)),
        (HALF, {"rows": ROWS}, torch.float16, (16,)),
        (HALF, {"rows": ROWS}, torch.float16, (2, 4)),
        (HALF, {"rows": ROWS.flip(0)}, torch.float16, (4, 4)),
        (HALF, {"rows": ROWS - 1}, torch.float16, (4, 4)),
        (HALF, {"rows": ROWS}, torch.float16, (9, 4)),
        (HALF, {"rows": ROWS}, torch.float16, (2**40, 4)),
    ],
)
def test_parts_that_contradict_each_other_are_an_error_of_ours(
    main: torch.Tensor, companions: dict[str, torch.Tensor], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    base = torch.zeros(4, 4, dtype=torch.float16)
    with pytest.raises(RecordCorruptError):
        to_restored(Stored(main, companions, dtype, shape, "0" * 16), base)
