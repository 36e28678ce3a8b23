"""The spec's cache manager: its names, its layout, and the faults of the tool that it comes from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.embeddings.toy_family import picture

from dittocache import CacheError, DataError, EmbeddingCacheManager, RecordCorruptError, check_cache_exists
from dittocache.embeddings.foreign import hashing

HASH_MAPS = {  # as in the spec
    "image_latents": "image_hash",
    "control_latents": "controls_sum_hash",
    "prompt_embeds": "prompt_hash",
    "prompt_embeds_mask": "prompt_hash",
    "empty_prompt_embeds": "prompt_hash",
    "empty_prompt_embeds_mask": "prompt_hash",
    "img_shapes": "main_hash",
}
DROP_KEYS = ["empty_prompt_embeds", "empty_prompt_embeds_mask"]  # as in the spec


def embeddings(seed: int = 0, tokens: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image_latents": torch.randn(4, 64, generator=generator).bfloat16(),
        "control_latents": torch.randn(6, 64, generator=generator).bfloat16(),
        "prompt_embeds": torch.randn(tokens, 8, generator=generator).bfloat16(),
        "prompt_embeds_mask": torch.ones(tokens, dtype=torch.bool),
        "empty_prompt_embeds": torch.randn(tokens - 2, 8, generator=generator).bfloat16(),
        "empty_prompt_embeds_mask": torch.ones(tokens - 2, dtype=torch.bool),
        "img_shapes": torch.tensor([[1, 2, 2], [1, 2, 3]], dtype=torch.int32),
    }


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.fixture
def sample(tmp_path: Path) -> dict[str, Any]:
    return {
        "image": str(picture(tmp_path / "set/a.bmp", "target")),
        "control": str(picture(tmp_path / "set/a_control.bmp", "control")),
        "prompt": "make it blue",
    }


@pytest.fixture(params=["safetensors", "pt"])
def manager(tmp_path: Path, request: pytest.FixtureRequest) -> EmbeddingCacheManager:
    return EmbeddingCacheManager(tmp_path / "cache", format=request.param)


def save(manager: EmbeddingCacheManager, sample: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    sample["file_hashes"] = manager.get_file_hashes(sample)
    maps = {key: HASH_MAPS[key] for key in tensors}
    return manager.save_cache_embedding(tensors, maps, sample["file_hashes"])


def test_what_is_saved_is_loaded_with_its_own_dtype(manager: EmbeddingCacheManager, sample: dict[str, Any]) -> None:
    saved = embeddings()
    save(manager, sample, saved)
    loaded = manager.load_cache(sample)
    assert loaded is sample
    assert loaded["cached"] is True
    for key, tensor in saved.items():
        if not key.startswith("empty_"):
            assert same(loaded[key], tensor), key
    assert "empty_prompt_embeds" not in loaded


def test_the_layout_is_the_specs(tmp_path: Path, sample: dict[str, Any]) -> None:
    manager = EmbeddingCacheManager(tmp_path / "cache", format="pt")
    save(manager, sample, embeddings())
    hashes = sample["file_hashes"]
    metadata = json.loads((tmp_path / f"cache/metadata/{hashes['main_hash']}.json").read_text())
    assert metadata == {"version": "2.0", **{key: hashes[name] for key, name in HASH_MAPS.items()}}
    for key, name in HASH_MAPS.items():
        # What qflux does to read it.
        there = torch.load(tmp_path / f"cache/{key}/{hashes[name]}.pt", map_location="cpu", weights_only=False)
        assert same(there, embeddings()[key])
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_the_hashes_are_the_specs(tmp_path: Path, sample: dict[str, Any]) -> None:
    manager = EmbeddingCacheManager(tmp_path / "cache")
    sample["controls"] = [str(picture(tmp_path / "set/more.bmp", "more"))]
    md5 = {name: hashlib.md5(Path(sample[name]).read_bytes()).hexdigest() for name in ("image", "control")}
    more = hashlib.md5(Path(sample["controls"][0]).read_bytes()).hexdigest()
    prompt, empty = (hashlib.md5(text).hexdigest() for text in (b"make it blue", b"empty"))
    assert manager.get_file_hashes(sample) == {
        "image_hash": md5["image"],
        "control_hash": md5["control"],
        "prompt_hash": prompt,
        "empty_prompt_hash": empty,
        "control_prompt_hash": md5["control"] + prompt,
        "control_empty_prompt_hash": md5["control"] + empty,
        "control_1_hash": more,
        "controls_sum_hash": md5["control"] + more,
        "main_hash": md5["image"] + md5["control"] + prompt,
    }
    assert manager.hash_string_md5("empty") == empty
    assert manager.get_hash(sample["image"], "make it blue") == md5["image"] + prompt
    with pytest.raises(DataError, match=r"nothing\.png cannot be read"):
        manager.get_hash(tmp_path / "nothing.png")
    with pytest.raises(DataError, match="give the first control picture as `control`"):
        manager.get_file_hashes({"controls": sample["controls"]})


def test_opened_pictures_that_look_alike_have_different_hashes(tmp_path: Path) -> None:
    manager = EmbeddingCacheManager(tmp_path)
    one = Image.new("RGB", (32, 32), (10, 20, 30))
    other = one.copy()
    other.putpixel((3, 3), (10, 20, 31))
    assert manager.get_hash(one) == manager.get_hash(one.copy())
    assert manager.get_hash(one) != manager.get_hash(other)
    assert manager.get_hash(one) != manager.get_hash(one.resize((64, 16)))


def test_another_picture_of_the_same_size_has_another_hash(tmp_path: Path) -> None:
    manager = EmbeddingCacheManager(tmp_path)
    file = picture(tmp_path / "a.bmp", "first")
    before, status = manager.get_hash(file), file.stat()
    picture(file, "second")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    assert manager.get_hash(file) != before


def test_a_second_change_within_one_tick_of_the_clock_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On file systems with coarse times a file may change twice and look the same."""
    manager = EmbeddingCacheManager(tmp_path)
    file = picture(tmp_path / "a.bmp", "first")
    status = hashing.status_of(file)
    monkeypatch.setattr(hashing, "status_of", lambda path: status)
    before = manager.get_hash(file)
    picture(file, "second")
    assert manager.get_hash(file) != before


def test_the_same_prompt_with_another_control_keeps_both(
    tmp_path: Path, manager: EmbeddingCacheManager, sample: dict[str, Any]
) -> None:
    """The spec's own hash map gives both embeddings the prompt's hash; qflux overwrites the first one."""
    other = {**sample, "control": str(picture(tmp_path / "set/other.bmp", "other"))}
    first, second = embeddings(1), embeddings(2, tokens=9)
    save(manager, sample, first)
    stems = save(manager, other, second)
    assert stems["prompt_embeds"].startswith(other["file_hashes"]["prompt_hash"] + "-")
    for one, saved in ((sample, first), (other, second)):
        loaded = manager.load_cache(one, replace_empty_embeddings=False)
        assert same(loaded["prompt_embeds"], saved["prompt_embeds"])
    assert save(manager, other, second) == stems  # again: nothing new
    assert len(list((tmp_path / "cache/prompt_embeds").iterdir())) == 2


def test_control_prompt_hash_needs_no_second_name(tmp_path: Path, sample: dict[str, Any]) -> None:
    manager = EmbeddingCacheManager(tmp_path / "cache")
    other = {**sample, "control": str(picture(tmp_path / "set/other.bmp", "other"))}
    for number, one in enumerate((sample, other)):
        hashes = manager.get_file_hashes(one)
        tensors = {"prompt_embeds": embeddings(number)["prompt_embeds"]}
        stems = manager.save_cache_embedding(tensors, {"prompt_embeds": "control_prompt_hash"}, hashes)
        assert stems == {"prompt_embeds": hashes["control_prompt_hash"]}


def test_a_dropped_prompt_takes_the_empty_ones_and_their_masks(
    manager: EmbeddingCacheManager, sample: dict[str, Any]
) -> None:
    saved = embeddings()
    save(manager, sample, saved)
    for keys in (DROP_KEYS, None, ["empty_prompt_embeds"]):
        loaded = manager.load_cache(dict(sample), replace_empty_embeddings=True, prompt_empty_drop_keys=keys)
        assert same(loaded["prompt_embeds"], saved["empty_prompt_embeds"])
        assert same(loaded["prompt_embeds_mask"], saved["empty_prompt_embeds_mask"])
        assert same(loaded["image_latents"], saved["image_latents"])


def test_the_default_drop_keys_suit_a_family_without_masks(tmp_path: Path, sample: dict[str, Any]) -> None:
    manager = EmbeddingCacheManager(tmp_path / "cache")
    saved = {key: tensor for key, tensor in embeddings().items() if not key.endswith("_mask")}
    save(manager, sample, saved)
    loaded = manager.load_cache(sample, True, DROP_KEYS)
    assert same(loaded["prompt_embeds"], saved["empty_prompt_embeds"])


def test_dropping_what_is_not_cached_is_an_error_and_no_silence(tmp_path: Path, sample: dict[str, Any]) -> None:
    manager = EmbeddingCacheManager(tmp_path / "cache")
    save(manager, sample, embeddings())
    with pytest.raises(CacheError, match="names empty_prompt_embed; the sample has empty_prompt_embeds,"):
        manager.load_cache(sample, True, ["empty_prompt_embed"])
    with pytest.raises(CacheError, match="names nothing"):
        manager.load_cache(sample, True, [])
    save(manager, sample, {"prompt_embeds": embeddings()["prompt_embeds"]})
    with pytest.raises(CacheError, match="no embeddings of the empty prompt are cached"):
        manager.load_cache(sample, True)


def test_a_sample_that_is_not_cached_is_left_as_it_was(manager: EmbeddingCacheManager, sample: dict[str, Any]) -> None:
    sample["file_hashes"] = manager.get_file_hashes(sample)
    before = dict(sample)
    assert manager.load_cache(sample) == {**before, "cached": False}


@pytest.mark.parametrize("key", list(HASH_MAPS)[:4])
def test_a_sample_that_is_cached_in_part_counts_as_not_cached(
    tmp_path: Path, manager: EmbeddingCacheManager, sample: dict[str, Any], key: str
) -> None:
    save(manager, sample, embeddings())
    shutil.rmtree(tmp_path / "cache" / key)
    before = dict(sample)
    assert manager.load_cache(sample) == {**before, "cached": False}
    save(manager, sample, embeddings())  # and a second caching run completes it
    assert manager.load_cache(sample)["cached"] is True


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_a_damaged_file_is_named_or_computed_again(
    tmp_path: Path, manager: EmbeddingCacheManager, sample: dict[str, Any], damage: str
) -> None:
    save(manager, sample, embeddings())
    [file] = (tmp_path / "cache/prompt_embeds").iterdir()
    content = bytearray(file.read_bytes())
    content[content.index(bytes(embeddings()["prompt_embeds"].view(torch.uint8).numpy().data)) + 5] ^= 1
    file.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "flipped": content}[damage])
    with pytest.raises(RecordCorruptError, match=rf"{file.name}.*cache again"):
        manager.load_cache(sample)
    assert "prompt_embeds" not in sample
    assert manager.load_cache(sample, on_damage="recompute")["cached"] is False
    save(manager, sample, embeddings())
    assert same(manager.load_cache(sample)["prompt_embeds"], embeddings()["prompt_embeds"])


def test_damaged_metadata_is_named(tmp_path: Path, sample: dict[str, Any]) -> None:
    manager = EmbeddingCacheManager(tmp_path / "cache")
    save(manager, sample, embeddings())
    [file] = (tmp_path / "cache/metadata").iterdir()
    file.write_text(file.read_text()[:40])
    with pytest.raises(RecordCorruptError, match=r"\.json is damaged"):
        manager.load_cache(sample)
    file.write_text('{"version": "2.0", "prompt_embeds": "../../secret"}')
    with pytest.raises(CacheError, match="'../../secret' is no hash"):
        manager.load_cache(sample)
    file.write_text('{"version": "9"}')
    with pytest.raises(CacheError, match="has version '9'; expected '2.0'"):
        manager.load_cache(sample)


def test_a_file_under_another_ones_name_is_not_taken_for_it(tmp_path: Path, sample: dict[str, Any]) -> None:
    manager = EmbeddingCacheManager(tmp_path / "cache")
    save(manager, sample, embeddings())
    [latents], [controls] = ((tmp_path / "cache" / key).iterdir() for key in ("image_latents", "control_latents"))
    shutil.copy(controls, latents)
    with pytest.raises(RecordCorruptError, match="renamed or exchanged"):
        manager.load_cache(sample)


def test_half_precision_is_an_option_for_floats_only(tmp_path: Path, sample: dict[str, Any]) -> None:
    manager = EmbeddingCacheManager(tmp_path / "cache", float_dtype=torch.float16)
    save(manager, sample, embeddings())
    loaded = manager.load_cache(sample)
    assert loaded["prompt_embeds"].dtype == torch.float16
    assert loaded["prompt_embeds_mask"].dtype == torch.bool
    assert loaded["img_shapes"].dtype == torch.int32
    with pytest.raises(CacheError, match="too large for torch.float16"):
        save(manager, sample, {"prompt_embeds": torch.tensor([[1e5]])})
    with pytest.raises(CacheError, match="no floating type"):
        EmbeddingCacheManager(tmp_path, float_dtype=torch.int8)


def test_loading_reads_no_source_file(tmp_path: Path, sample: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    manager = EmbeddingCacheManager(tmp_path / "cache")
    save(manager, sample, embeddings())
    shutil.rmtree(tmp_path / "set")
    assert manager.load_cache(sample)["cached"] is True
    del sample["file_hashes"]
    with pytest.raises(CacheError, match="no file_hashes"):
        manager.load_cache(sample)


def test_shapes_inside_the_metadata_are_read(tmp_path: Path, sample: dict[str, Any]) -> None:
    """qflux may write `img_shapes` into the JSON file instead of a file of its own."""
    manager = EmbeddingCacheManager(tmp_path / "cache")
    save(manager, sample, {"image_latents": embeddings()["image_latents"]})
    [file] = (tmp_path / "cache/metadata").iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"img_shapes": [[1, 2, 2]]}))
    assert manager.load_cache(sample)["img_shapes"].tolist() == [[1, 2, 2]]


def test_what_does_not_fit_is_named(tmp_path: Path, sample: dict[str, Any]) -> None:
    manager = EmbeddingCacheManager(tmp_path / "cache")
    hashes = manager.get_file_hashes(sample)
    tensor = torch.ones(2)
    with pytest.raises(CacheError, match="differ in latents"):
        manager.save_cache_embedding({"latents": tensor}, {}, hashes)
    with pytest.raises(CacheError, match=r"file_hashes has no mask_hash; it has control_empty"):
        manager.save_cache_embedding({"latents": tensor}, {"latents": "mask_hash"}, hashes)
    with pytest.raises(CacheError, match="'../x' is no embedding key"):
        manager.save_cache_embedding({"../x": tensor}, {"../x": "image_hash"}, hashes)
    with pytest.raises(CacheError, match="is a list; expected a tensor"):
        manager.save_cache_embedding({"img_shapes": [1]}, {"img_shapes": "main_hash"}, hashes)  # type: ignore[dict-item]
    with pytest.raises(CacheError, match="format 'zip' is unknown"):
        EmbeddingCacheManager(tmp_path, format="zip")  # type: ignore[arg-type]
    assert not check_cache_exists(tmp_path / "cache")


def test_hashes_in_a_batch_of_one_and_very_many_controls(tmp_path: Path, sample: dict[str, Any]) -> None:
    manager = EmbeddingCacheManager(tmp_path / "cache")
    sample["controls"] = [str(picture(tmp_path / f"set/{number}.bmp", number)) for number in range(9)]
    hashes = manager.get_file_hashes(sample)
    assert len(hashes["controls_sum_hash"]) == 320  # longer than a file name may be
    batch = {name: [value] for name, value in hashes.items()}
    saved = embeddings()["control_latents"]
    manager.save_cache_embedding({"control_latents": saved}, {"control_latents": "controls_sum_hash"}, batch)
    assert same(manager.load_cache({"file_hashes": batch})["control_latents"], saved)


def test_existence_is_metadata(tmp_path: Path, manager: EmbeddingCacheManager, sample: dict[str, Any]) -> None:
    root = tmp_path / "cache"
    assert not EmbeddingCacheManager.exist(root)
    (root / "metadata").mkdir(parents=True)
    assert not check_cache_exists(root)
    save(manager, sample, embeddings())
    assert EmbeddingCacheManager.exist(root)
    assert check_cache_exists(str(root))


def test_clearing_removes_the_layout_and_nothing_else(
    tmp_path: Path, manager: EmbeddingCacheManager, sample: dict[str, Any]
) -> None:
    root = tmp_path / "cache"
    save(manager, sample, embeddings())
    hashes = sample["file_hashes"]
    manager.save_cache_embedding(
        {"own_key": torch.ones(1)}, {"own_key": "image_hash"}, {**hashes, "main_hash": "other"}
    )
    kept = [root / "notes.txt", root / "prompt_embeds/readme.md", root / "objects/ab/record.safetensors"]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    outside = picture(tmp_path / "outside.pt", "a file that a link leads to")
    (root / "prompt_embeds/link.pt").symlink_to(outside)
    planned = manager.clear_cache(dry_run=True)
    assert len(planned) == len(HASH_MAPS) + 3
    assert all(path.is_file() for path in planned)
    assert manager.clear_cache() == planned
    assert not check_cache_exists(root)
    assert not any(path.exists() for path in planned)
    assert all(path.read_text() == "mine" for path in kept)
    assert outside.exists()
    assert not (root / "image_latents").exists()
    assert manager.clear_cache() == []


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path, sample: dict[str, Any]) -> None:
    manager = EmbeddingCacheManager(tmp_path / "cache")
    save(manager, sample, embeddings())
    child = os.fork()
    if child == 0:  # its process id is in the name that it leaves behind
        from dittocache.embeddings.store import writer_id

        (tmp_path / f"cache/prompt_embeds/.abc.{writer_id.current()}.0011aabb.tmp").write_bytes(b"half")
        os._exit(0)
    os.waitpid(child, 0)
    assert any(path.suffix == ".tmp" for path in manager.clear_cache())
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, sample: dict[str, Any]) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    manager = EmbeddingCacheManager(tmp_path / "cache")
    with pytest.raises(CacheError, match="cannot be written .*choose another cache_dir"):
        save(manager, sample, embeddings())
