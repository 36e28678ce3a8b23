"""Plans of sets with settings of every kind: what did not change is remembered, and each change has its cause."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dittocache.data import digests, file_table
from dittocache.data.config import DataConfig
from dittocache.data.digests import ContentIndex
from dittocache.data.loading import load_samples, notes_of
from dittocache.demo.tiny import save_tiny
from dittocache.embeddings.planning.keys import KeyMaker
from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.planning.misses import ABSENT
from dittocache.embeddings.planning.plan import Plan, make_plan
from dittocache.embeddings.store.store import Store
from dittocache.families.base import Sizes
from dittocache.families.registry import get_family

EDITS, TEXT_TO_IMAGE = "qwen-image-edit-plus", "qwen-image"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in (EDITS, TEXT_TO_IMAGE):
        save_tiny(folder / family, family)
    return folder


@dataclass
class Planner:
    """Plans the data of some settings, each time from nothing but the files and the memory."""

    folder: Path
    models: Path
    made: list[str] = field(default_factory=list)

    def __call__(
        self, family: str = EDITS, memory: bool = True, previous: Manifest | None = None, **settings: Any
    ) -> Plan:
        data = {"path": None if "sets" in settings else self.folder / "set", "resolution": 64, **settings}
        config = DataConfig(**data)
        described = get_family(family)
        samples = load_samples(config, described.size_multiple, self.folder / "memory" if memory else None)
        self.made.clear()
        plan = make_plan(
            samples,
            described,
            Sizes(config.side, 32),
            self.models / family,
            torch.bfloat16,
            Store(self.folder / "store"),
            ContentIndex(self.folder / f"index-{memory}.json"),
            previous=previous,
        )
        self.names = [sample.name for sample in samples]
        self.notes = notes_of(samples)
        return plan


@pytest.fixture
def planner(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Planner:
    """Four samples of different sizes; files count as left alone for long, though they were just written."""
    monkeypatch.setattr(digests, "GRANULARITY_NS", -(10**10))
    monkeypatch.setattr("dittocache.embeddings.planning.memory.CHECKED", 1)
    monkeypatch.setattr("dittocache.embeddings.planning.memory.CHECKED_SHAPES", 0)
    for number, size in enumerate([(96, 96), (40, 40), (200, 100), (100, 230)]):
        for place in ("images", "control"):
            path = tmp_path / f"set/{place}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, (10 * number, 20, len(place))).save(path)
        (tmp_path / f"set/images/{number}.txt").write_text(f"paint it {number}")
        (tmp_path / f"set/images/{number}.caption").write_text(f"colour it {number}")
    found = Planner(tmp_path, models)
    real = KeyMaker.row

    def row(maker: KeyMaker, sample: Any) -> Any:
        found.made.append(sample.name)
        return real(maker, sample)

    monkeypatch.setattr(KeyMaker, "row", row)
    return found


def causes(plan: Plan) -> set[str]:
    return {one.cause for one in plan.missed.by_cause} - {ABSENT}


CHANGES = [
    ({"resolution": 128}, {"resolution changed", "picture shapes changed"}),
    ({"bucket_step": 64}, {"resolution changed", "picture shapes changed"}),
    ({"upscale": False}, {"resolution changed", "picture shapes changed"}),
    ({"buckets": False}, {"cropped changed", "cropped changed, resolution changed", "picture shapes changed"}),
    ({"control_resolution": 96}, {"resolution changed", "picture shapes changed"}),
    ({"resize_controls": False}, {"resolution changed", "picture shapes changed"}),
    ({"caption_prefix": "a photo of"}, {"caption changed"}),
    ({"trigger_word": "ohwx"}, {"caption changed"}),
    ({"caption_extension": ".caption"}, {"caption changed"}),
    ({"flip": True}, {"new"}),
    ({"resolution": [64, 96]}, {"new"}),
]  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), CHANGES, ids=lambda value: ",".join(sorted(map(str, value))))
def test_a_changed_setting_is_seen_and_named(planner: Planner, change: dict[str, Any], expected: set[str]) -> None:
    before = planner()
    again = planner(previous=before.manifest, **change)
    assert causes(again) == expected
    assert set(planner.made) == set(planner.names)  # all of them: the memory stands for other settings
    assert again.manifest == planner(memory=False, **change).manifest
    assert again.manifest == planner(**change).manifest
    assert len(planner.made) == 1  # the one that is checked; all others are remembered


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bucket_step": 64, "upscale": False, "caption_prefix": "a photo of", "trigger_word": "ohwx", "repeats": 3},
        {"buckets": False, "flip": True, "resolution": [64, 96], "control_resolution": 128},
    ],
    ids=["plain", "words", "variants"],
)
def test_nothing_is_read_or_worked_out_again_of_what_did_not_change(
    planner: Planner, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = planner(**settings)

    def unexpected(path: Path) -> Any:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(file_table, "hash_file", unexpected)
    monkeypatch.setattr(file_table, "picture_size", unexpected)
    assert planner(**settings).manifest == before.manifest
    assert len(planner.made) == 1 and len(planner.names) == len(before.manifest.samples)


def test_repeats_change_no_plan(planner: Planner) -> None:
    before = planner()
    again = planner(repeats=7)
    assert (again.manifest, len(planner.made)) == (before.manifest, 1)
    assert {need.sample.repeats for need in again.needs["vae"]} == {7}


@pytest.mark.parametrize(("family", "shared"), [(TEXT_TO_IMAGE, True), (EDITS, False)])
def test_variants_share_their_prompt_unless_the_encoder_sees_a_mirrored_control(
    planner: Planner, family: str, shared: bool
) -> None:
    (planner.folder / "set/control").rename(planner.folder / ("unused" if family == TEXT_TO_IMAGE else "set/control"))
    found = planner(family, flip=True, resolution=[64, 96]).manifest.samples
    for number in range(4):
        names = [f"{number}{suffix}" for suffix in ("", "@96", "@flipped", "@96@flipped")]
        prompts = [found[name]["prompt_embeds"] for name in names]
        assert prompts[0] == prompts[1] and prompts[2] == prompts[3]
        assert (prompts[0] == prompts[2]) is shared
        assert len({found[name]["image_latents"] for name in names}) == 4


def test_several_sets_are_each_remembered(planner: Planner, tmp_path: Path) -> None:
    rows = "".join(f"images/{number}.png,control/{number}.png,listed {number}\n" for number in range(3))
    (planner.folder / "set/listed.csv").write_text(f"path_target,path_control,prompt\n{rows}")
    places = [{"path": planner.folder / "set"}, {"path": planner.folder / "set/listed.csv"}]
    sets = [*places, {**places[0], "resolution": 96}]
    before = planner(sets=sets)
    assert [name.split("/")[0] for name in planner.names] == [*["set"] * 4, *["listed"] * 3, *["set-2"] * 4]
    assert before.manifest == planner(sets=sets, memory=False).manifest
    assert list(before.manifest.samples) == [need.sample.name for need in before.needs["vae"]] == planner.names
    (planner.folder / "set/images/1.txt").write_text("something else")
    again = planner(sets=sets, previous=before.manifest)
    # One is checked in each set; the changed one is in two of them.
    assert len(planner.made) == 5 and causes(again) == {"caption changed"}
    assert again.manifest == planner(sets=sets, memory=False).manifest


def test_notes_of_sets_are_those_of_their_plan(planner: Planner) -> None:
    (planner.folder / "sets.toml").write_text("[[datasets]]\nimage_directory = 'set/images'\nbatch_size = 2\n")
    plan = planner(TEXT_TO_IMAGE, path=planner.folder / "sets.toml")
    assert planner.notes and all(note in plan.notes for note in planner.notes)
    assert "batch_size = 2 does not count" in plan.describe()
