"""The draft on disk, and what a YAML file, a preset and the form make of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dittocache.config import check_config, load_config, save_config
from dittocache.errors import AccessError, ConfigError
from dittocache.studio.draft import Draft, given_settings
from dittocache.studio.form_fields import GROUPS, FormField, form_fields, problems_by_field, shown_value, typed_value
from dittocache.studio.memory import memory_words
from dittocache.studio.presets import is_bare, load_file, preset_settings, presets, quick_start, save_file
from dittocache.studio.state import Studio
from dittocache.studio.training import outside_problems

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
PLACES = {"data.path": "pictures", "model.path": "bundled"}


def test_another_start_of_the_studio_goes_on_with_the_draft(tmp_path: Path) -> None:
    first = Draft(tmp_path / "studio" / "draft.json")
    first.update({"train.steps": 20, "data.path": "pictures"})
    first.set("data.path", None)
    assert Draft(first.path).given == {"train.steps": 20}


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\x00\xff"])
def test_a_damaged_draft_is_an_empty_one(tmp_path: Path, content: str) -> None:
    path = tmp_path / "draft.json"
    path.write_text(content, encoding="utf-8")
    draft = Draft(path)
    assert draft.given == {}
    draft.set("name", "again")
    assert draft.given == {"name": "again"}


def test_every_change_is_another_version(tmp_path: Path) -> None:
    draft = Draft(tmp_path / "draft.json")
    assert draft.version == 0
    draft.set("train.steps", 1)
    assert draft.version != 0


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_survives_the_draft(file: Path) -> None:
    config = load_config(file)
    assert check_config({}, given_settings(config)) == config


def test_every_setting_has_a_field_with_help() -> None:
    fields = form_fields()
    assert len(fields) > 80
    assert [field.name for field in fields if not field.help.strip()] == []
    assert {field.group for field in fields} == set(GROUPS)


@pytest.mark.parametrize("field", [one for one in form_fields() if one.default], ids=lambda field: field.name)
def test_a_default_typed_again_is_the_default(field: FormField) -> None:
    value = typed_value(field, field.default)
    typed = check_config({}, PLACES if value is None else {**PLACES, field.name: value})
    alone = check_config(
        {}, {**PLACES, f"{field.group}": {}} if field.group in ("teacache", "reference_kv") else PLACES
    )
    assert typed == alone


def test_lists_are_typed_as_yaml() -> None:
    field = next(one for one in form_fields() if one.name == "train.betas")
    assert typed_value(field, "[0.9, 0.99]") == [0.9, 0.99]
    assert typed_value(field, "  ") is None
    with pytest.raises(ConfigError, match="train.betas"):
        typed_value(field, "[0.9")


def test_floats_are_shown_in_full() -> None:
    assert [float(shown_value(value)) for value in (1e-4, 0.123456789, 2e-3)] == [1e-4, 0.123456789, 2e-3]


def test_problems_stand_beside_their_setting() -> None:
    with pytest.raises(ConfigError) as caught:
        check_config({}, {**PLACES, "train.steps": "many", "train.stepz": 3, "data.resolution": "x"})
    found = problems_by_field(caught.value.problems)
    assert "a whole number" in found["train.steps"][0]
    assert "data.resolution" in found
    assert any("did you mean train.steps" in one for one in found[""])


def test_presets_say_what_they_are_for_and_keep_your_places() -> None:
    found = presets()
    assert len(found) >= 15
    for preset in found:
        assert "GB" in preset.title and not any(note.startswith("dittocache") for note in preset.notes)
        settings = preset_settings(preset, {"data.path": "mine", "name": "cat", "train.steps": 3})
        assert settings["data.path"] == "mine" and settings["name"] == "cat"
        assert settings["train.steps"] != 3
        check_config({}, {name: value for name, value in settings.items() if value is not None})


def test_a_preset_of_your_family_keeps_your_model() -> None:
    preset = next(one for one in presets() if one.name == "qwen-image-edit-plus-24gb")
    mine = {"model.path": "/models/mine", "model.family": "qwen-image-edit-plus"}
    assert preset_settings(preset, mine)["model.path"] == "/models/mine"
    other = {"model.path": "/models/mine", "model.family": "flux"}
    assert preset_settings(preset, other)["model.path"] == "Qwen/Qwen-Image-Edit-2511"


def test_a_file_with_a_typo_changes_nothing(studio: Studio) -> None:
    studio.draft.set("train.steps", 7)
    (studio.base / "mine.yaml").write_text("model: {path: bundled}\ndata: {path: x}\ntrain: {stesp: 3}\n")
    with pytest.raises(ConfigError, match="did you mean train.steps"):
        load_file(studio, Path("mine.yaml"))
    assert studio.draft.given == {"train.steps": 7}


def test_saved_settings_load_again(studio: Studio) -> None:
    studio.draft.update({**PLACES, "train.steps": 12, "train.betas": [0.8, 0.9]})
    config = studio.config()
    file = save_file(studio, Path("mine"))
    assert file == studio.base / "mine.yaml"
    studio.draft.replace({})
    load_file(studio, file)
    assert studio.config() == config == load_config(file)


def test_files_outside_the_roots_are_refused(studio: Studio, tmp_path: Path) -> None:
    studio.draft.update(PLACES)
    save_config(studio.config(), tmp_path / "outside.yaml")
    with pytest.raises(AccessError):
        load_file(studio, tmp_path / "outside.yaml")
    with pytest.raises(AccessError):
        save_file(studio, tmp_path / "other.yaml")


@pytest.mark.parametrize(
    "name",
    ["data.path", "output_dir", "held_out", "cache.cache_dir", "model.path", "generate.lora", "data.control_path"],
)
def test_no_setting_leads_outside_the_roots(studio: Studio, name: str) -> None:
    config = check_config({}, {**PLACES, name: "../outside"})
    problems = outside_problems(studio, config)
    assert len(problems) == 1 and problems[0].startswith(f"{name}: ")
    assert outside_problems(studio, check_config({}, {**PLACES, name: "inside/it"})) == []


def test_nothing_outside_the_roots_is_looked_at(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for name, path in (("data.path", tmp_path / "pictures"), ("model.path", tmp_path / "model")):
        studio.draft.replace({"data.path": "mine", "model.path": "bundled", name: str(path)})
        with pytest.raises(ConfigError, match=f"{name}: .*outside the Studio's folders"):
            quick_start(studio)
        assert "outside the Studio's folders" in memory_words(studio, studio.draft.given).text


def test_quick_start_chooses_for_data_and_model(studio: Studio, edits: Path) -> None:
    studio.draft.replace({"data.path": str(edits), "model.path": "bundled", "model.device": "cpu"})
    assert is_bare(studio.draft.given)
    told = quick_start(studio)
    assert "4 samples, a qwen-image-edit-plus" in told[0] and not any("--" in one for one in told)
    assert not is_bare(studio.draft.given)
    assert studio.draft.given["data.resolution"] == 128 and studio.config().name == "edits"
    words = memory_words(studio, studio.draft.given)
    assert words.total and words.text.startswith("Memory for training about")
