"""Plans of a folder that remember: what did not change is not read again, and every change is seen all the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from tests.embeddings.toy_family import Job, picture

from dittocache.data import digests, file_table
from dittocache.data.config import SetConfig
from dittocache.data.digests import ContentIndex
from dittocache.data.folder import load_folder
from dittocache.embeddings import recipe as recipe_module
from dittocache.embeddings.planning.keys import KeyMaker
from dittocache.embeddings.planning.plan import Plan, make_plan
from dittocache.embeddings.store.storage import Storage
from dittocache.errors import DataError


@dataclass
class FolderJob:
    """A folder of samples, planned with a memory and without."""

    job: Job
    storage: Storage = Storage()
    read: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.job.folder / "set"

    @property
    def memory(self) -> Path:
        return self.job.folder / "cache/memory"

    def plan(self, memory: bool = True) -> Plan:
        config = SetConfig(path=self.folder, resolution=self.job.sizes.resolution)
        samples = load_folder(config, 16, self.memory if memory else None)
        index = ContentIndex(self.job.folder / f"cache/index-{memory}.json")
        job = self.job
        return make_plan(samples, job.family, job.sizes, job.model, job.dtype, job.store, index, storage=self.storage)

    def check(self) -> Plan:
        """A plan with the memory, after which it must be that of somebody who remembers nothing."""
        plan = self.plan()
        assert plan.manifest == self.plan(memory=False).manifest
        assert [sample.name for sample in plan.needs["vae"]._samples] == list(plan.manifest.samples)
        return plan


@pytest.fixture
def folder(job: Job, monkeypatch: pytest.MonkeyPatch) -> FolderJob:
    """Six samples in a folder, planned once; files count as left alone for long, though they were just written."""
    monkeypatch.setattr(digests, "GRANULARITY_NS", -(10**10))
    for number, sample in enumerate(job.samples):
        sample.target.with_suffix(".txt").write_text(f"paint it {number}")
    found = FolderJob(job)
    found.plan()

    def recorded(function: Callable[..., object], log: list[str]) -> Callable[..., object]:
        def call(first: object, *rest: object) -> object:
            log.append(getattr(first, "name", "") or getattr(rest[0], "name", ""))
            return function(first, *rest)

        return call

    monkeypatch.setattr(file_table, "hash_file", recorded(file_table.hash_file, found.read))
    monkeypatch.setattr(file_table, "picture_size", recorded(file_table.picture_size, found.read))
    monkeypatch.setattr(KeyMaker, "row", recorded(KeyMaker.row, found.made))
    return found


def test_nothing_is_read_again_of_what_did_not_change(folder: FolderJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dittocache.embeddings.planning.memory.CHECKED", 1)
    monkeypatch.setattr("dittocache.embeddings.planning.memory.CHECKED_SHAPES", 0)
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: folder.read.append(self.name) or real(self, *a, **k))
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.memory.iterdir())
    plan = folder.plan()
    assert ([name for name in folder.read if name != "METADATA"], len(folder.made)) == ([], 1)
    assert len(plan.manifest.samples) == 6 and plan.needs["vae"][2].sample.prompt == "paint it 2"
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.memory.iterdir()) == before


def edit_caption(folder: FolderJob) -> None:
    (folder.folder / "images/01.txt").write_text("another caption")


def swap_image(folder: FolderJob) -> None:
    """Another picture of the same size in pixels and bytes, with the same modification time."""
    target = folder.folder / "images/01.bmp"
    before = target.stat()
    picture(target, "another image")
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap_caption_behind_the_same_mtime(folder: FolderJob) -> None:
    caption = folder.folder / "images/01.txt"
    before = caption.stat()
    caption.write_text("paint it 9")
    os.utime(caption, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap_control(folder: FolderJob) -> None:
    picture(folder.folder / "control/01.bmp", "another control")


def exchange_two_files(folder: FolderJob) -> None:
    first, second, third = (folder.folder / f"control/{name}" for name in ("01.bmp", "02.bmp", "x"))
    first.rename(third)
    second.rename(first)
    third.rename(second)


def add_control(folder: FolderJob) -> None:
    picture(folder.folder / "control/01_control_1.bmp", "further")


def two_controls_in_another_order(folder: FolderJob) -> None:
    picture(folder.folder / "control/01_control_1.bmp", "further")
    folder.plan()
    first, second, third = (folder.folder / f"control/{name}" for name in ("01.bmp", "01_control_1.bmp", "x"))
    first.rename(third)
    second.rename(first)
    third.rename(second)


def add_sample(folder: FolderJob) -> None:
    picture(folder.folder / "images/000.bmp", "new").with_suffix(".txt").write_text("new")
    picture(folder.folder / "control/000.bmp", "new control")


def delete_sample(folder: FolderJob) -> None:
    for name in ("images/01.bmp", "images/01.txt", "control/01.bmp"):
        (folder.folder / name).unlink()


def rename_sample(folder: FolderJob) -> None:
    for name in ("images/01.bmp", "images/01.txt", "control/01.bmp"):
        path = folder.folder / name
        path.rename(path.with_stem("99"))


def another_size(folder: FolderJob) -> None:
    from PIL import Image

    Image.new("RGB", (16, 8)).save(folder.folder / "images/01.bmp")


def change_resolution(folder: FolderJob) -> None:
    folder.job.sizes = replace(folder.job.sizes, resolution=128)


def change_condition_resolution(folder: FolderJob) -> None:
    folder.job.sizes = replace(folder.job.sizes, condition_resolution=48)


def change_dtype(folder: FolderJob) -> None:
    folder.job.dtype = torch.float16


def change_storage(folder: FolderJob) -> None:
    folder.storage = Storage("fp8", shared_prefix=True)


def change_weights(folder: FolderJob) -> None:
    (folder.job.model / "vae/model.safetensors").write_bytes(b"weights of VAE")


def change_tokenizer(folder: FolderJob) -> None:
    (folder.job.model / "tokenizer/tokenizer.json").write_text("[]")


def change_template(folder: FolderJob) -> None:
    folder.job.template = "What is {}?"


CHANGES = [
    (edit_caption, 1),
    (swap_image, 1),
    (swap_caption_behind_the_same_mtime, 1),
    (swap_control, 1),
    (exchange_two_files, 2),
    (add_control, 1),
    (two_controls_in_another_order, 1),
    (add_sample, 1),
    (delete_sample, 0),
    (rename_sample, 1),
    (another_size, 1),
    (change_resolution, 6),
    (change_condition_resolution, 6),
    (change_dtype, 6),
    (change_storage, 6),
    (change_weights, 6),
    (change_tokenizer, 6),
    (change_template, 6),
]


@pytest.mark.parametrize(("change", "samples"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_plan_that_remembers_is_the_plan_of_one_that_does_not(
    folder: FolderJob, change: Callable[[FolderJob], None], samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder.plan().manifest
    change(folder)
    monkeypatch.setattr("dittocache.embeddings.planning.memory.CHECKED", 1)
    monkeypatch.setattr("dittocache.embeddings.planning.memory.CHECKED_SHAPES", 0)
    folder.made.clear()
    plan = folder.plan()
    assert len(folder.made) in (samples, samples + 1)  # and the one that is checked
    assert plan.manifest != before
    folder.check()


def test_what_changed_within_the_clocks_granularity_is_read_again(
    folder: FolderJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The status is the same although the content is not, as on a file system that counts in seconds."""
    before = folder.plan().manifest
    target = folder.folder / "images/01.bmp"
    status = target.stat()
    picture(target, "another image")
    real = file_table.FileTable.scanned.__func__  # type: ignore[attr-defined]

    def with_the_old_status(cls: type[file_table.FileTable], *arguments: object) -> file_table.FileTable:
        table: file_table.FileTable = real(cls, *arguments)
        if "images/01.bmp" in table.names:
            table.status = table.status.copy()
            table.status[table.row_of["images/01.bmp"]] = status.st_size, status.st_mtime_ns, status.st_ctime_ns
        return table

    monkeypatch.setattr(file_table.FileTable, "scanned", classmethod(with_the_old_status))
    monkeypatch.setattr(file_table.FileTable, "changed_since", lambda *_: False)
    assert folder.plan().manifest == before  # left alone for long, as far as can be told
    monkeypatch.setattr(digests, "GRANULARITY_NS", 2 * 10**9)
    assert folder.plan().manifest != before


def test_library_versions_count(folder: FolderJob, monkeypatch: pytest.MonkeyPatch) -> None:
    before = folder.plan().manifest
    versions = {"diffusers": "0.99", "transformers": recipe_module.library_version("transformers")}
    monkeypatch.setattr(recipe_module, "library_version", versions.__getitem__)
    assert not before.keys & folder.check().manifest.keys


@pytest.mark.parametrize("kind", ["files-*", "keys-*"])
@pytest.mark.parametrize("damage", ["truncated", "bit", "empty", "gone", "other"])
def test_a_damaged_memory_is_started_afresh(folder: FolderJob, kind: str, damage: str) -> None:
    before = folder.plan().manifest
    [path] = folder.memory.glob(kind)
    content = path.read_bytes()
    middle = len(content) // 2
    damaged = {
        "truncated": content[:middle],
        "bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "empty": b"",
        "other": b"PK\x03\x04",
    }
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    folder.made.clear()
    assert folder.plan().manifest == before
    assert len(folder.made) >= 6 or kind == "files-*"
    folder.made.clear()
    folder.read.clear()
    folder.plan()
    assert folder.read == []


def test_a_memory_that_does_not_hold_is_given_up(folder: FolderJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the context does not tell: here the family's own rule for its artifacts."""
    before = folder.plan().manifest
    family = type(folder.job.family)
    real = family.artifacts

    def others(self: object, *arguments: object) -> object:
        return [replace(one, transform={**one.transform, "new": 1}) for one in real(self, *arguments)]  # type: ignore[arg-type]

    monkeypatch.setattr(family, "artifacts", others)
    assert not before.keys & folder.check().manifest.keys


def test_a_memory_that_cannot_be_written_is_told(folder: FolderJob, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_caption(folder)

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("dittocache.data.file_memory.save_columns", refuse)
    monkeypatch.setattr("dittocache.embeddings.planning.memory.save_columns", refuse)
    plan = folder.check()
    notes = "\n".join(plan.notes)
    assert "files of" in notes and "keys will be worked out again" in notes and "Read-only" in notes


def test_a_file_that_vanishes_or_changes_after_it_was_listed_is_named(folder: FolderJob) -> None:
    config = SetConfig(path=folder.folder, resolution=64)
    samples = load_folder(config, 16, folder.memory)
    assert not samples.table.changed_since(samples.table.row_of["images/03.bmp"])
    picture(folder.folder / "images/03.bmp", "meanwhile")
    assert samples.table.changed_since(samples.table.row_of["images/03.bmp"])
    samples.table.digested[:] = False
    job = folder.job
    with pytest.raises(DataError) as caught:
        make_plan(samples, job.family, job.sizes, job.model, job.dtype, job.store, ContentIndex(job.folder / "i.json"))
    [problem] = caught.value.problems
    assert "03.bmp changed while it was read" in problem
