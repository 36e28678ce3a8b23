"""Configs of the embedding cache's specification: each key is mapped, says what happens anyway, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dittocache.config import check_config, load_config
from dittocache.config_aliases.names import ALIASES
from dittocache.config_aliases.rules import ONLY
from dittocache.errors import ConfigError

FILE = Path(__file__).parent / "edit_with_masks.yaml"


def nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return dict(value)


def merged(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in other.items():
        both[key] = merged(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


SMALLEST = {"model": {"path": "bundled"}, "data": {"path": "pictures"}}


def problems_of(name: str, value: Any, base: dict[str, Any] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_config(merged(base or SMALLEST, nested(name, value)))
    return list(caught.value.problems)


def test_a_whole_config_loads() -> None:
    config = load_config(FILE)
    assert (config.model.path, config.model.family, config.run_dir) == (
        "models/edit",
        "qwen-image-edit-plus",
        Path("outcome/portraits"),
    )
    assert config.data.paths == [Path("sets/faces"), Path("sets/hands")]
    assert all(one.frames == ((576, 832),) and not one.buckets for one in config.data.every_set)
    assert all(one.control_resolution == 512 for one in config.data.every_set)
    assert config.data.caption_dropout == 0.1
    assert config.cache.cache_dir == Path("outcome/portraits/cache")
    assert config.cache.devices == {"vae": "cuda:0", "text_encoder": "cuda:1"}
    assert config.cache.num_workers == 3
    train = config.train
    assert (train.rank, train.alpha, train.lora_targets, train.lora_init) == (
        24,
        12,
        ["to_q", "to_v", "to_out.0"],
        "gaussian",
    )
    assert (train.steps, train.batch_size, train.gradient_accumulation_steps, train.max_grad_norm) == (900, 2, 2, 0.5)
    assert (train.base_quantization, train.mixed_precision, train.gradient_checkpointing) == ("fp8", "bf16", True)
    assert (train.learning_rate, train.betas, train.weight_decay) == (2e-4, (0.9, 0.95), 0.02)
    assert train.optimizer_args == {"eps": 1e-8}
    assert (train.lr_schedule, train.warmup_steps) == ("constant", 20)
    assert (train.checkpoint_every, train.keep_checkpoints) == (150, 4)
    assert (train.validate_every, train.validation_pictures, train.log_with) == (300, 3, ["tensorboard"])


@pytest.mark.parametrize("name", ONLY)
def test_what_happens_anyway_is_accepted_and_anything_else_refused(name: str) -> None:
    accepted, instead = ONLY[name]
    for value in accepted:
        check_config(merged(SMALLEST, nested(name, value)))
    [problem] = problems_of(name, "something else")
    assert problem == f"{name}: found 'something else'; {instead}"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("trainer", "Flux2Klein", "expected QwenImageEdit, QwenImageEditPlus"),
        ("model.quantize", "4bit", "expected true (fp8) or false"),
        ("data.class_path", "my.Dataset", "other classes cannot be loaded"),
        ("data.init_args.processor.class_path", "my.Processor", "leave it out"),
        ("data.init_args.processor.init_args.process_type", "center_padding", "expected center_crop"),
        ("data.init_args.processor.init_args.target_size", 512, "expected [height, width]"),
        ("data.init_args.processor.init_args.target_pixels", "many", "expected a number such as 1024*1024"),
        (
            "data.init_args.processor.init_args.controls_size",
            [[512, 512], [256, 256]],
            "all control pictures are brought to one area",
        ),
        ("predict.devices", {"vae": "cuda:0", "dit": "cuda:2"}, "pictures are made on model.device"),
        ("loss.class_path", "my.Loss", "expected one of MaskEditLoss"),
        ("loss.mask_loss", True, "found 'nothing, which means 1.0'; expected 0"),
        ("loss.init_args.background_weight", 0.5, "loss.background_weight: found 0.5; expected 0"),
        ("train.mixed_precision", "fp8", "train.mixed_precision: found 'fp8'"),
        ("train.trainer", "DreamOmni2", "model.family"),
        ("data.init_args.caption_dropout_rte", 0.1, "did you mean data.init_args.caption_dropout_rate?"),
        ("model.lora.lora_alhpa", 3, "did you mean model.lora.lora_alpha?"),
        ("predict.device", "cuda", "predict.device: there is no such setting"),
        ("loss.init_args.reduction", "sum", "the loss is a mean"),
        ("cache.cache_dir", "${nowhere.at_all}", "${nowhere.at_all} names no setting"),
        ("cache.cache_dir", "${cache.cache_dir}/x", "leads back to itself"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(name: str, value: Any, words: str) -> None:
    assert any(words in problem for problem in problems_of(name, value)), problems_of(name, value)


def test_data_sets_of_the_hub_are_refused_and_say_how_to_get_them() -> None:
    base = {"model": {"path": "bundled"}}
    found = problems_of("data.init_args.dataset_path", [{"repo_id": "who/what", "split": "train"}], base)
    assert any("hf download --repo-type dataset" in problem for problem in found)


def test_steps_and_epochs() -> None:
    assert check_config(merged(SMALLEST, nested("train.num_epochs", 7))).train.epochs == 7
    assert check_config(merged(SMALLEST, {"train": {"num_epochs": None, "max_train_steps": 9}})).train.steps == 9
    both = check_config(merged(SMALLEST, {"train": {"num_epochs": 7, "max_train_steps": 9}})).train
    assert (both.epochs, both.most_steps) == (7, 9)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"process_type": "center_crop", "target_size": [512, 512]}, (512, False, None)),
        ({"process_type": "fixed_pixels", "target_pixels": "512*512"}, (512, True, None)),
        ({"target_pixels": 262144, "controls_pixels": ["256*256"]}, (512, True, 256)),
        ({"target_size": [512, 512], "controls_size": [512, 512]}, (512, False, None)),
    ],
)
def test_sizes(sizes: dict[str, Any], expected: tuple[Any, ...]) -> None:
    data = check_config(merged(SMALLEST, nested("data.init_args.processor.init_args", sizes))).data
    assert (data.resolution, data.buckets, data.control_resolution) == expected


def test_devices_of_encoders_while_training_count_where_they_are_loaded() -> None:
    devices = {"train": {"fit_device": {"vae": "cuda:1", "text_encoder_2": "cpu"}, "text_encoder_device": "cuda:2"}}
    assert check_config(merged(SMALLEST, devices)).cache.devices == {}
    live = merged(merged(SMALLEST, devices), {"cache": {"use_cache": False}})
    assert check_config(live).cache.devices == {"vae": "cuda:1", "text_encoder": "cuda:2", "text_encoder_2": "cpu"}
    other = merged(live, {"cache": {"devices": {"vae": "cpu"}}})
    with pytest.raises(ConfigError, match="they mean the same"):
        check_config(other)
    assert problems_of("train.fit_device.dit", "cuda")[0].startswith("train.fit_device.dit: there is no such setting")


def test_every_alias_leads_to_a_setting() -> None:
    content = yaml.safe_load(FILE.read_text())
    assert content["trainer"]
    for alias, name in ALIASES.items():
        problems: list[str] = []
        try:
            check_config(merged(SMALLEST, nested(alias, "?")))
        except ConfigError as error:
            problems = list(error.problems)
        assert not any("no such setting" in problem for problem in problems), (alias, name, problems)
