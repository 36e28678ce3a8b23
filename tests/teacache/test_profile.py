"""A profile is found by the model it was made for, and says what differs from it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from tests.denoising import EDIT, Pipeline, qwen_transformer, velocities

from dittocache.errors import ConfigError, StepCacheError
from dittocache.families.denoiser import find_denoiser
from dittocache.sampling.session import cached
from dittocache.teacache.config import TeaCacheConfig
from dittocache.teacache.fingerprint import ModelPrint, fingerprint
from dittocache.teacache.profile import Calibration, Profile, RunPrint, known_profile, load_profile, profiles_folder

STEPS = 8
RUN = RunPrint(steps=STEPS, tokens=EDIT.noise, branches=1, size=(64, 64), guidance={"true_cfg_scale": 1.0})
FIT = Calibration(
    coefficients=(2.0, 1.0, 0.0), fitted_range=(0.01, 0.9), r2_fit=0.9, r2_held_out=0.8, points=20, held_out_points=10
)
TUNED = {"gate": "error", "error_tolerance": 0.01, "prediction": "residual_linear"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DITTOCACHE_PROFILES", str(tmp_path / "profiles"))
    return tmp_path / "profiles"


def printed(target: Any) -> ModelPrint:
    return fingerprint(find_denoiser(target))


def profile_of(target: Any, **fields: Any) -> Profile:
    known = {"run": RUN, "calibration": {"residual": FIT}, **fields}
    return Profile(made=datetime.now(UTC), model=printed(target), **known)


def saved(target: Any, **fields: Any) -> Profile:
    profile = profile_of(target, **fields)
    profile.save(profiles_folder() / profile.file_name)
    return profile


def with_lora(scale: float = 1.0, seed: int = 0) -> Any:
    model = qwen_transformer()
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    for layer in model.modules():
        if hasattr(layer, "scaling"):
            layer.scaling["style"] = scale
    return model


def test_the_same_weights_have_one_fingerprint_in_every_format() -> None:
    rounded = qwen_transformer()
    for weight in rounded.parameters():
        weight.data = weight.data.bfloat16().float()
    assert printed(rounded) == printed(rounded.to(torch.bfloat16))
    assert printed(qwen_transformer()) == printed(qwen_transformer())


def test_what_differs_is_named() -> None:
    known = printed(Pipeline(qwen_transformer()))
    tuned = qwen_transformer()
    tuned.transformer_blocks[1].attn.to_q.weight.data += 0.1
    shifted = Pipeline(qwen_transformer())
    shifted.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    found = {
        "the checkpoint": known.differences(printed(Pipeline(tuned))),
        "the LoRA (none, now": known.differences(printed(Pipeline(with_lora()))),
        "the sampler (shift 1.0, now 3.0)": known.differences(printed(shifted)),
        "the architecture": known.differences(printed(Pipeline(qwen_transformer(layers=2)))),
    }
    for words, differences in found.items():
        assert differences[0].startswith(words)
    assert len(found["the LoRA (none, now"]) == 1  # the weights below it are the same


def test_a_lora_is_known_by_its_weights_and_scale_not_by_its_name() -> None:
    known = printed(with_lora())
    assert known.differences(printed(with_lora())) == []
    assert "at scale 0.5" in known.differences(printed(with_lora(scale=0.5)))[0]
    assert known.differences(printed(with_lora(seed=1)))[0].startswith("the LoRA")
    silent = with_lora()
    silent.disable_adapters()
    assert printed(silent).lora == ()


def test_weights_that_are_not_in_memory_are_no_difference() -> None:
    with torch.device("meta"):
        empty = torch.nn.Linear(2, 2)
    assert printed(empty).weights is None
    assert printed(empty).differences(printed(torch.nn.Linear(2, 2))) == []


def test_auto_finds_the_model_and_uses_its_settings() -> None:
    saved(qwen_transformer(seed=3), settings={"gate": "distance", "rel_l1_thresh": 1e6})
    saved(qwen_transformer(), settings=TUNED)
    model = qwen_transformer()
    with cached(model, TeaCacheConfig(profile="auto", num_inference_steps=STEPS)) as found:
        velocities(model, EDIT, STEPS)
    with cached(model, TeaCacheConfig(**TUNED, num_inference_steps=STEPS)) as expected:
        velocities(model, EDIT, STEPS)
    assert [step.cause for step in found.steps] == [step.cause for step in expected.steps]
    assert not any("profile" in note for note in found.notes)


def test_another_checkpoints_profile_is_used_with_a_remark(folder: Path) -> None:
    saved(qwen_transformer(seed=3), settings=TUNED)
    model = qwen_transformer()
    with cached(model, TeaCacheConfig(profile="auto", num_inference_steps=STEPS)) as trace:
        velocities(model, EDIT, STEPS)
    assert "made with another model: the checkpoint (other weights) differ" in trace.notes[0]


def test_runs_of_another_kind_are_said(tmp_path: Path) -> None:
    path = profile_of(qwen_transformer(), settings=TUNED).save(tmp_path / "profile.json")
    model = qwen_transformer()
    config = TeaCacheConfig(profile=str(path), num_inference_steps=12)
    edit = replace(EDIT, branches=("cond", "uncond"), shapes=((1, 6, 4), (1, 4, 4)))
    with cached(model, config) as trace:
        velocities(model, edit, 12)
        velocities(model, edit, 12)
    said = [note for note in trace.notes if "the profile was made with" in note]
    assert [note.split("made with ")[1].split(".")[0] for note in said] == [
        "8 steps, this run has 12",
        "16 noise tokens a picture (its size), this run has 24",
        "1 passes a step (guidance), this run has 2",
    ]


def test_what_is_set_wins_over_the_profile() -> None:
    profile = profile_of(qwen_transformer(), settings=TUNED)
    assert profile.settings_for(TeaCacheConfig(profile="auto")) == TeaCacheConfig(**TUNED)
    looser = profile.settings_for(TeaCacheConfig(profile="auto", gate="error", error_tolerance=0.05))
    assert looser == TeaCacheConfig(**{**TUNED, "error_tolerance": 0.05})
    own = profile.settings_for(TeaCacheConfig(profile="auto", rel_l1_thresh=0.3))
    assert (own.gate, own.coefficients, own.fitted_range) == ("distance", FIT.coefficients, FIT.fitted_range)
    mine = profile.settings_for(TeaCacheConfig(profile="auto", rel_l1_thresh=0.3, coefficients=(1.0, 0.0)))
    assert (mine.coefficients, mine.fitted_range) == ((1.0, 0.0), None)


def test_a_calibration_belongs_to_what_is_predicted() -> None:
    other = FIT.model_copy(update={"coefficients": (5.0, 0.0)})
    profile = profile_of(qwen_transformer(), calibration={"residual": FIT, "output": other})
    assert profile.settings_for(TeaCacheConfig(profile="auto")).coefficients == FIT.coefficients
    chosen = TeaCacheConfig(profile="auto", prediction="output_linear")
    assert profile.settings_for(chosen).coefficients == (5.0, 0.0)


def test_it_is_the_same_after_saving(tmp_path: Path) -> None:
    profile = profile_of(Pipeline(qwen_transformer()), settings=TUNED, remark="look")
    assert load_profile(profile.save(tmp_path / "a" / "p.json")) == profile
    assert known_profile(profile.model, RUN) is None
    profile.save(profiles_folder() / profile.file_name)
    assert known_profile(profile.model, RUN) == profile
    assert known_profile(profile.model, RUN.model_copy(update={"steps": 9})) is None


def test_errors_say_how_to_mend_them(tmp_path: Path) -> None:
    model = qwen_transformer()
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    foreign = profile_of(qwen_transformer(layers=2)).save(tmp_path / "foreign.json")
    for path, kind, message in (
        ("auto", ConfigError, r"holds none for this QwenImageTransformer2DModel; make one with `dittocache calibrate`"),
        (str(tmp_path / "none.json"), ConfigError, "there is no file"),
        (str(broken), ConfigError, "is no profile of this version"),
        (str(foreign), StepCacheError, "another configuration"),
    ):
        with pytest.raises(kind, match=message), cached(model, TeaCacheConfig(profile=path)):
            pass
    assert not hasattr(model, "_diffusers_hook")
