"""The `data` section: one source or several, and messages that say what to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dittocache.config import check_config
from dittocache.data.config import DataConfig
from dittocache.errors import ConfigError


def checked(**data: Any) -> DataConfig:
    return check_config({"model": {"path": "bundled"}, "data": data}).data


def problem(**data: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        checked(**data)
    [found] = caught.value.problems
    return found


def test_the_section_says_what_holds_for_all_of_its_sets() -> None:
    found = checked(resolution=512, flip=True, sets=[{"path": "a"}, {"path": "b", "resolution": [256, [960, 544]]}])
    first, second = found.every_set
    assert (first.frames, first.flip) == (((512, 512),), True)
    assert (second.frames, second.flip) == (((256, 256), (960, 544)), True)
    assert found.side == 512


def test_saved_settings_are_those_that_were_given() -> None:
    found = checked(resolution=512, sets=[{"path": "a", "resolution": 1024}, {"path": "b"}], trigger_word="ohwx")
    assert DataConfig.model_validate(found.model_dump(mode="json")) == found
    one = checked(path="a", resolution=[[960, 544]], columns={"prompt": "text"})
    assert DataConfig.model_validate(one.model_dump(mode="json")) == one


def test_a_job_may_have_no_data_set_if_it_says_so() -> None:
    assert checked(sets=[]).paths == []
    again = checked(**checked(sets=[], resolution=512).model_dump())
    assert again.paths == [] and again.side == 512


@pytest.mark.parametrize(("written", "side"), [("512", 512), ([512, 768], 512), ([[960, 544]], 723)])
def test_the_first_resolution_is_that_of_the_run(written: Any, side: int) -> None:
    assert checked(path="a", resolution=written).side == side


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "data.path is missing: Folder with"),
        ({"path": None}, "data.path is missing"),
        ({"path": "a", "sets": [{"path": "b"}]}, "data.path: found 'a'; expected either data.path or data.sets"),
        ({"sets": [{"flip": True}]}, "data.sets.0.path is missing"),
        ({"sets": [{"path": "a", "reapets": 2}]}, "data.sets.0.reapets: there is no such setting; did you mean"),
        ({"path": "a", "resolution": 16}, "data.resolution: found 16; expected a side in pixels, 32 or more"),
        ({"path": "a", "resolution": []}, "data.resolution: found []; expected a side in pixels"),
        ({"path": "a", "resolution": [512, 512]}, "each resolution once; 512 is there twice"),
        ({"path": "a", "resolution": True}, "data.resolution: found True"),
        ({"path": "a", "repeats": 0}, "data.repeats: found 0; expected greater than or equal to 1"),
        ({"path": "a", "caption_extension": "."}, "expected a file ending such as .txt"),
        ({"path": "a", "columns": {"picture": "a"}}, "expected columns for target, controls, prompt, mask"),
    ],
)
def test_a_wrong_setting_is_told_with_what_is_expected(data: dict[str, Any], words: str) -> None:
    assert words in problem(**data)


def test_a_held_out_set_is_looked_at_once_in_one_size() -> None:
    found = checked(path="a", resolution=[512, 768], flip=True, repeats=3, caption_prefix="p", bucket_step=32)
    held_out = found.held_out(Path("b"))
    assert held_out.every_set[0].path == Path("b") and held_out.frames == ((512, 512),)
    assert (held_out.flip, held_out.repeats, held_out.caption_prefix, held_out.bucket_step) == (False, 1, "p", 32)
    several = checked(sets=[{"path": "a"}], resolution=[[960, 544]])
    assert several.held_out(Path("b")).frames == ((960, 544),)


def test_paths_can_be_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = checked(sets=[{"path": "a", "control_path": "c"}, {"path": str(tmp_path / "b")}]).absolute()
    assert found.paths == [tmp_path / "a", tmp_path / "b"] and found.sets[0].control_path == tmp_path / "c"
    assert checked(path="a").absolute().path == tmp_path / "a"


def test_paths_become_absolute_and_a_hub_id_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    config = DataConfig.model_validate({"sets": [{"path": "mine"}, {"path": "user/name"}]}).absolute()
    assert [one.path for one in config.every_set] == [tmp_path / "mine", Path("user/name")]
