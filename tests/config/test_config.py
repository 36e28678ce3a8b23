"""Settings: files, overrides, and errors that list every problem at once."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dittocache.config import check_config, load_config, parse_overrides, save_config, setting_fields
from dittocache.errors import ConfigError

SMALLEST: dict[str, Any] = {"model": {"path": "bundled"}, "data": {"path": "pictures"}}


def with_settings(**sections: Any) -> dict[str, Any]:
    return {name: {**SMALLEST.get(name, {}), **section} for name, section in {**SMALLEST, **sections}.items()}


def problems_of(content: dict[str, Any], overrides: dict[str, Any] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        check_config(content, overrides)
    return caught.value.problems


def test_smallest_config_has_defaults_and_no_sampling_caches() -> None:
    config = check_config(SMALLEST)
    assert config.run_dir == Path("runs/run")
    assert config.cache.use_cache
    assert config.teacache is None
    assert config.reference_kv is None


def test_saved_config_is_read_back_equal(tmp_path: Path) -> None:
    config = check_config(
        with_settings(teacache={"rel_l1_thresh": 0.3, "coefficients": [1.0, 0.0]}, reference_kv={"refresh": 4})
    )
    save_config(config, tmp_path / "run" / "config.yaml")
    assert load_config(tmp_path / "run" / "config.yaml") == config
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_overrides_win_over_the_file_and_open_optional_sections(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(with_settings(train={"steps": 5, "rank": 4})))
    config = load_config(path, {"train.steps": "20", "teacache.rel_l1_thresh": "0.4", "cache.use_cache": "false"})
    assert (config.train.steps, config.train.rank) == (20, 4)
    assert config.teacache is not None
    assert config.teacache.rel_l1_thresh == 0.4
    assert not config.cache.use_cache


def test_override_null_takes_a_section_away() -> None:
    content = with_settings(teacache={"rel_l1_thresh": 0.4})
    assert check_config(content, parse_overrides(["--teacache", "null"])).teacache is None


def test_every_problem_is_listed_at_once_with_its_dotted_name() -> None:
    found = problems_of(
        with_settings(
            model={"dtype": "bf16"},
            train={"steps": 0, "stpes": 3},
            cache={"batch_size": "many"},
            generate={"image": [5]},
        )
        | {"name": "a/b"}
    )
    assert len(found) == 6
    by_name = {problem.partition(":")[0]: problem for problem in found}
    assert "found 'bf16'; expected 'bfloat16', 'float16' or 'float32'" in by_name["model.dtype"]
    assert "found 0; expected greater than or equal to 1" in by_name["train.steps"]
    assert "did you mean train.steps?" in by_name["train.stpes"]
    assert "found 'many'; expected a whole number" in by_name["cache.batch_size"]
    assert "found 5; expected a path" in by_name["generate.image.0"] or "path" in by_name["generate.image.0"]
    assert "found 'a/b'; expected Name of the run's folder" in by_name["name"]


def test_missing_sections_say_what_they_need() -> None:
    found = problems_of({})
    assert found == ("model is missing; it needs model.path", "data is missing; it needs data.path")
    [missing_path] = problems_of({"model": {"path": "bundled"}, "data": {}})
    assert missing_path.startswith("data.path is missing: Folder with")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("steps", "train.steps"),  # right name, section left out
        ("trian.steps", "train"),
        ("train.learning_rte", "train.learning_rate"),
        ("generate.rank", "train.rank"),  # right name, other section
        ("generate.steps", "generate.num_inference_steps"),  # end of a name in its own section
        ("teacache.rel_l1_tresh", "teacache.rel_l1_thresh"),
    ],
)
def test_unknown_settings_get_the_nearest_name(wrong: str, meant: str) -> None:
    [problem] = problems_of(SMALLEST, {wrong: "1"})
    assert problem.endswith(f"did you mean {meant}?")


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_numbers_are_finite(number: str) -> None:
    [problem] = problems_of(SMALLEST, {"train.learning_rate": number})
    assert problem.startswith(f"train.learning_rate: found {number!r}; expected ")


def test_settings_that_do_not_go_together_are_told_without_the_whole_section() -> None:
    [problem] = problems_of(SMALLEST, {"train.offload": "group"})
    assert problem.startswith("train: offload: group needs gradient_checkpointing: true; without it")


def test_unlike_names_get_no_suggestion() -> None:
    [problem] = problems_of(SMALLEST, {"zzzz": "1"})
    assert problem == "zzzz: there is no such setting"


def test_override_inside_a_plain_value_is_a_problem() -> None:
    assert any(
        "name is 'x', which holds no settings" in line for line in problems_of({**SMALLEST, "name": "x"}, {"name.a": 1})
    )


def test_run_name_cannot_leave_the_output_folder() -> None:
    for name in ("..", "../x", "/x", "", ".hidden", "a b/c"):
        [problem] = problems_of({**SMALLEST, "name": name})
        assert problem.startswith("name: found")


def test_settings_are_immutable() -> None:
    config = check_config(SMALLEST)
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"


class TestFiles:
    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"there is no config file .*none\.yaml"):
            load_config(tmp_path / "none.yaml")

    def test_not_yaml(self, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text("model: [unclosed")
        with pytest.raises(ConfigError, match="not valid YAML"):
            load_config(tmp_path / "c.yaml")

    def test_not_text(self, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(tmp_path / "c.yaml")

    def test_a_list_is_no_config(self, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text("- model\n- data\n")
        with pytest.raises(ConfigError, match="holds a list"):
            load_config(tmp_path / "c.yaml")

    def test_a_key_given_twice_is_an_error_rather_than_the_last_one_winning(self, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text("model: {path: bundled}\ndata: {path: x}\ntrain:\n  steps: 1\n  steps: 2\n")
        with pytest.raises(ConfigError, match="'steps' is given twice"):
            load_config(tmp_path / "c.yaml")

    def test_an_empty_file_lists_what_is_missing(self, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text("# nothing yet\n")
        with pytest.raises(ConfigError, match="model is missing"):
            load_config(tmp_path / "c.yaml")

    def test_yaml_cannot_make_objects(self, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text("name: !!python/object/apply:os.getcwd []\n")
        with pytest.raises(ConfigError, match="not valid YAML"):
            load_config(tmp_path / "c.yaml")


class TestCommandLineWords:
    def test_both_spellings_and_values_of_every_kind(self) -> None:
        words = ["--train.steps", "20", "--generate.seed=-3", "--generate.image", "[a.png, b.png]", "--teacache=null"]
        words += ["--generate.prompt", "make it: red", "--train.batch-size", "2"]
        assert parse_overrides(words) == {
            "train.steps": "20",
            "generate.seed": "-3",
            "generate.image": ["a.png", "b.png"],
            "teacache": None,
            "generate.prompt": "make it: red",
            "train.batch_size": "2",
        }

    def test_a_negative_number_is_a_value(self) -> None:
        assert parse_overrides(["--generate.seed", "-3"]) == {"generate.seed": "-3"}

    def test_every_word_out_of_place_is_listed(self) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_overrides(["steps", "--train.steps", "--train.rank", "--generate.image", "[a"])
        first, second, third, fourth = caught.value.problems
        assert "'steps' is out of place" in first
        assert "--train.steps has no value" in second
        assert "--train.rank has no value" in third
        assert "is not a YAML list" in fourth


class TestSpecSpellings:
    def test_cache_settings_of_the_data_section(self) -> None:
        config = check_config(with_settings(data={"init_args": {"cache_dir": "/c", "use_cache": True}}))
        assert config.cache.cache_dir == Path("/c")
        assert config.cache.use_cache

    def test_same_value_under_both_names_is_fine(self) -> None:
        content = with_settings(data={"init_args": {"cache_dir": "/c"}}, cache={"cache_dir": "/c"})
        assert check_config(content).cache.cache_dir == Path("/c")

    def test_different_values_under_both_names_are_a_problem(self) -> None:
        content = with_settings(data={"init_args": {"cache_dir": "/a"}}, cache={"cache_dir": "/b"})
        [problem] = problems_of(content)
        assert problem == "data.init_args.cache_dir is '/a' but cache.cache_dir is '/b'; they mean the same: keep one"

    def test_other_init_args_are_not_dropped_silently(self) -> None:
        [problem] = problems_of(with_settings(data={"init_args": {"cache_dir": "/c", "shuffle": True}}))
        assert problem == "data.init_args.shuffle: there is no such setting; did you mean data.shuffle?"

    def test_encoder_devices(self) -> None:
        content = with_settings(
            cache={
                "vae_encoder_device": "cuda:1",
                "text_encoder_device": "cuda:2",
                "devices": {"text_encoder_2": "cpu"},
            }
        )
        assert check_config(content).cache.devices == {
            "vae": "cuda:1",
            "text_encoder": "cuda:2",
            "text_encoder_2": "cpu",
        }

    def test_drop_keys_must_be_the_whole_pair(self) -> None:
        pair = ["empty_prompt_embeds", "empty_prompt_embeds_mask"]
        check_config(with_settings(cache={"prompt_empty_drop_keys": pair}))
        check_config(with_settings(cache={"prompt_empty_drop_keys": [pair[0], "empty_pooled_prompt_embeds"]}))
        for wrong in (pair[:1], [*pair, "empty_pooled"], "empty_prompt_embeds", [1]):
            [problem] = problems_of(with_settings(cache={"prompt_empty_drop_keys": wrong}))
            assert problem.startswith("cache.prompt_empty_drop_keys: found")

    def test_aliases_work_as_overrides(self) -> None:
        config = check_config(SMALLEST, {"cache.vae_encoder_device": "cuda:1", "teacache.teacache_thresh": "0.26"})
        assert config.cache.devices == {"vae": "cuda:1"}
        assert config.teacache is not None
        assert config.teacache.rel_l1_thresh == 0.26

    def test_the_callers_settings_are_left_as_they_were(self) -> None:
        content = with_settings(data={"init_args": {"cache_dir": "/c"}})
        check_config(content, {"train.steps": 3})
        assert content == with_settings(data={"init_args": {"cache_dir": "/c"}})


def test_every_setting_is_described() -> None:
    undescribed = [name for name, field in setting_fields() if not field.description]
    assert not undescribed


def test_one_picture_needs_no_brackets(tmp_path: Path) -> None:
    content = {"model": {"path": "bundled"}, "data": {"path": tmp_path}, "generate": {"prompt": "a", "image": "a.png"}}
    assert check_config(content).generate.image == [Path("a.png")]


def test_the_specs_training_sections_are_understood() -> None:
    content = {
        "model": {"pretrained_model_name_or_path": "somewhere", "lora": {"r": 8, "lora_alpha": 4}},
        "data": {"init_args": {"dataset_path": "pictures"}, "batch_size": 2},
        "optimizer": {
            "class_path": "bitsandbytes.optim.Adam8bit",
            "init_args": {"lr": "1e-4", "betas": [0.9, 0.99], "weight_decay": 0.1, "eps": "1e-8", "mode": "sparse"},
        },
        "lr_scheduler": {"scheduler_type": "constant_with_warmup", "warmup_steps": 5, "num_cycles": 0.5, "power": 2.0},
        "train": {
            "max_train_steps": 7,
            "checkpointing_steps": 3,
            "checkpoints_total_limit": 2,
            "gradient_accumulation_steps": 4,
            "mixed_precision": "bf16",
        },
        "logging": {"output_dir": "out", "report_to": "all"},
        "validation": {"enabled": True, "steps": 50, "max_samples": 3},
    }
    config = check_config(content)
    train = config.train
    assert (config.model.path, str(config.data.path), str(config.output_dir)) == ("somewhere", "pictures", "out")
    assert (train.optimizer, train.learning_rate) == ("bitsandbytes.optim.Adam8bit", 1e-4)
    assert (train.betas, train.weight_decay) == ((0.9, 0.99), 0.1)
    assert train.optimizer_args == {"eps": 1e-8, "mode": "sparse"}
    assert (train.lr_schedule, train.warmup_steps, train.lr_cycles, train.lr_power) == ("constant", 5, 1, 2.0)
    assert (train.steps, train.checkpoint_every, train.keep_checkpoints, train.batch_size) == (7, 3, 2, 2)
    assert (train.rank, train.alpha, train.log_with) == (8, 4, ["tensorboard", "wandb"])
    assert (train.validate_every, train.validation_pictures) == (50, 3)


def test_the_specs_training_sections_may_be_empty_off_or_wrong() -> None:
    quiet = {"optimizer": {}, "logging": {"report_to": "none"}, "validation": {"enabled": False, "steps": 50}}
    config = check_config(SMALLEST | quiet)
    assert (config.train.optimizer, config.train.log_with, config.train.validate_every) == ("adamw", [], None)
    found = problems_of(SMALLEST | {"optimizer": {"class": "x"}, "lr_scheduler": {"scheduler_type": "spiral"}})
    assert any(problem.startswith("optimizer.class: there is no such setting") for problem in found)
    assert any(problem.startswith("train.lr_schedule: found 'spiral'") for problem in found)
    [both] = problems_of(with_settings(train={"learning_rate": 1e-3}) | {"optimizer": {"init_args": {"lr": 1e-4}}})
    assert "optimizer.init_args.lr is 0.0001 but train.learning_rate is 0.001" in both
    [offload] = problems_of(with_settings(train={"offload": "group"}))
    assert "needs gradient_checkpointing: true" in offload
