"""The configuration guide's four ways to the step cache, each down to the steps that are skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.jobs.conftest import draw_set

from dittocache import Omni, OmniDiffusionConfig
from dittocache.cli import app as cli
from dittocache.cli import shared
from dittocache.config import RunConfig, check_config, save_config
from dittocache.demo.tiny import save_tiny
from dittocache.errors import ConfigError
from dittocache.events import read_events
from dittocache.jobs.stage import run_stage
from dittocache.sampling.cache_keys import ADAPTER_VARIABLE

PIPELINE = "QwenImageEditPlusPipeline"
STEPS = 6
# Random weights move far from step to step: distances are taken as they are, against a large threshold.
SKIPPING: dict[str, Any] = {"rel_l1_thresh": 100.0, "coefficients": [1.0, 0.0]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model") / "tiny", "qwen-image-edit-plus"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_set(tmp_path_factory.mktemp("data") / "set", 1)


def skipped_by(config: OmniDiffusionConfig) -> int:
    omni = Omni(config)
    omni.generate("a cat", STEPS, height=64, width=64, true_cfg_scale=1.0, output_type="latent")
    return omni.trace.skipped


def test_in_python_by_the_environment_and_by_yaml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "model", "qwen-image"))
    where: dict[str, Any] = {"model": model, "dtype": "float32", "device": "cpu", "cache_config": SKIPPING}
    assert skipped_by(OmniDiffusionConfig(**where, cache_adapter="tea_cache")) == STEPS - 2
    file = tmp_path / "stage.yaml"
    file.write_text(yaml.safe_dump({**where, "cache_adapter": "tea_cache"}))
    assert skipped_by(OmniDiffusionConfig.from_yaml(file)) == STEPS - 2
    assert skipped_by(OmniDiffusionConfig.from_kwargs(**where)) == 0
    monkeypatch.setenv(ADAPTER_VARIABLE, "tea_cache")
    assert skipped_by(OmniDiffusionConfig.from_kwargs(**where)) == STEPS - 2


Generate = Callable[..., dict[str, list[str]]]


@pytest.fixture
def generate(checkpoint: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generate:
    """`dittocache generate` with its stage in this process; gives what the steps of each way did."""

    def in_this_process(config: RunConfig, stages: Any, listener: Any, typed: str = "") -> Path:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, config.run_dir / "config.yaml")
        [stage] = stages
        assert run_stage(stage, config.run_dir) == 0
        return config.run_dir

    monkeypatch.setattr(shared, "run_workflow", in_this_process)
    file = tmp_path / "config.yaml"
    settings = {
        "output_dir": str(tmp_path / "runs"),
        "model": {"path": checkpoint, "dtype": "float32", "device": "cpu"},
        "data": {"path": str(pictures), "resolution": 64, "condition_resolution": 64},
        "generate": {"num_inference_steps": STEPS, "prompt": "make it red"},
    }
    settings["generate"]["image"] = [str(next((pictures / "control_images").iterdir()))]  # type: ignore[index]
    file.write_text(yaml.safe_dump(settings))

    def run(*words: str) -> dict[str, list[str]]:
        assert cli.run(["generate", "--config", str(file), *words]) == 0
        results = [one for one in read_events(tmp_path / "runs/run/events.jsonl") if "compared" in one]
        variants = results[-1]["compared"][0]["variants"] if results else []
        return {one["label"]: sum(one["patterns"].values(), []) for one in variants}

    return run


def test_on_the_command_line(generate: Generate) -> None:
    assert generate() == {}, "no cache, nothing to compare"
    config = json.dumps({**SKIPPING, "model_type": PIPELINE})
    steps = generate("--cache-config", config, "--model-class-name", PIPELINE)
    assert steps["TeaCache"].count("skipped") == STEPS - 2
    assert "skipped" not in steps["Uncached"]


def test_on_the_command_line_by_the_environment(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADAPTER_VARIABLE, "tea_cache")
    assert "TeaCache" in generate()


def settings(*words: str, named: str | None = None, **sections: Any) -> RunConfig:
    from dittocache.config import parse_overrides

    content = {"model": {"path": "bundled"}, "data": {"path": "pictures"}, **sections}
    return check_config(content, parse_overrides(words), named_cache=named)


def chosen(config: RunConfig) -> dict[str, Any] | None:
    return None if config.teacache is None else config.teacache.model_dump(exclude_unset=True)


@pytest.mark.parametrize(
    ("words", "named", "section", "expected"),
    [
        ((), None, {"gate": "error"}, {"gate": "error"}),
        (("--cache-adapter", "tea_cache"), None, None, {}),
        (("--cache-adapter", "tea_cache"), None, {"gate": "error"}, {"gate": "error"}),
        (("--cache-adapter", "none"), "tea_cache", {"gate": "error"}, None),
        (("--cache-config", '{"rel_l1_thresh": 0.4}'), None, {"gate": "error"}, {"rel_l1_thresh": 0.4}),
        (("--cache-config", '{"rel_l1_thresh": 0.4}', "--cache-adapter=none"), None, None, None),
        (("--feature_caching", "Tea", "--teacache_thresh", "0.26"), None, None, {"rel_l1_thresh": 0.26}),
        (("--feature_caching", "NoCaching"), "tea_cache", None, None),
        ((), "tea_cache", None, {}),
        ((), "none", {"gate": "error"}, {"gate": "error"}),
        (("--teacache", "null"), "tea_cache", None, None),
    ],
)
def test_what_counts_most(
    words: tuple[str, ...], named: str | None, section: dict[str, Any] | None, expected: dict[str, Any] | None
) -> None:
    assert chosen(settings(*words, named=named, teacache=section)) == expected


def test_the_guides_words_in_the_runs_own_file() -> None:
    config = settings(
        cache_adapter="tea_cache",
        cache_config={"rel_l1_thresh": 0.2, "model_type": PIPELINE},
        model_class_name=PIPELINE,
    )
    assert chosen(config) == {"rel_l1_thresh": 0.2, "model_type": PIPELINE}
    assert config.model.family == "qwen-image-edit-plus"
    assert chosen(settings(named="tea_cache", cache_adapter="none")) is None


def test_lightx2vs_keys() -> None:
    config = settings(feature_caching="Tea", infer_steps=4, coefficients=[[1.0, 0.0], [2.0, 0.0]], use_ret_steps=False)
    assert config.generate.num_inference_steps == 4
    assert chosen(config) == {"rel_l1_thresh": 0.15, "coefficients": (2.0, 0.0)}
    config = settings(feature_caching="Tea", coefficients=[[1.0, 0.0], [2.0, 0.0]], use_ret_steps=True)
    assert chosen(config) == {"rel_l1_thresh": 0.15, "coefficients": (1.0, 0.0), "ret_steps": 5}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--cache-adapter", "tea"), r"cache_adapter \(or DIFFUSION_CACHE_ADAPTER\): found 'tea'"),
        (("--cache-config", "0.2"), "cache_config: found '0.2'; expected settings of the cache"),
        (("--cache-config", '{"rel_l1_tresh": 1}'), "did you mean teacache.rel_l1_thresh"),
        (("--cache-config", '{"model_type": "YourPipeline"}'), "Unknown model type: 'YourPipeline'"),
        (("--model-class-name", "YourPipeline"), "model_class_name: Unknown model type: 'YourPipeline'"),
        (
            ("--cache-config", '{"model_type": "FluxPipeline"}', "--model-class-name", PIPELINE),
            "they must be the same",
        ),
        (("--cache-config", "{}", "--teacache.gate", "error"), "cache_config and teacache.gate are both given"),
        (("--feature_caching", "Taylor"), "expected Tea or NoCaching"),
    ],
)
def test_wrong_words_are_named(words: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        settings(*words)
