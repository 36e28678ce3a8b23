"""What was calibrated and tuned for one model: saved as JSON, found again by the model's fingerprint.

Profiles lie in one folder of the user's (`$DITTOCACHE_PROFILES`, else `~/.cache/dittocache/profiles`), where
`TeaCacheConfig(profile="auto")` looks; a run that makes one keeps a copy as `RUN/profile.json`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from dittocache.errors import ConfigError, StepCacheError
from dittocache.families.denoiser import Denoiser
from dittocache.families.run_clock import DenoisingCall
from dittocache.settings import Settings
from dittocache.teacache.config import TeaCacheConfig
from dittocache.teacache.fingerprint import ModelPrint, fingerprint, json_digest
from dittocache.teacache.gates import Gate, StepView
from dittocache.teacache.hook import StepCache
from dittocache.teacache.policy import Decision
from dittocache.teacache.prediction import Prediction

AUTO = "auto"
FOLDER_VARIABLE = "DITTOCACHE_PROFILES"


class RunPrint(Settings):
    """The runs that a profile was made on."""

    steps: int
    tokens: int | None
    """Noise tokens of a picture; None for a model that no family knows."""
    branches: int
    """Passes of the transformer a step: 2 with classifier-free guidance."""
    size: tuple[int, int]
    """(width, height) in pixels."""
    guidance: dict[str, float]
    """Guidance settings, by the pipeline's names."""


class Calibration(Settings):
    """How far the distance of two steps' signals tells the change of what is predicted."""

    coefficients: tuple[float, ...]
    """Highest power first; the last one is 0."""
    fitted_range: tuple[float, float]
    r2_fit: float
    r2_held_out: float | None
    """None where too few held-out points lie within the range."""
    points: int
    held_out_points: int


class Profile(Settings):
    """Everything measured for one model, sampler and kind of run."""

    format: Literal[1] = 1
    made: datetime
    model: ModelPrint
    run: RunPrint
    calibration: dict[Literal["residual", "output"], Calibration] = {}
    """By what is predicted on a skipped step."""
    settings: dict[str, Any] | None = None
    """Settings of `TeaCacheConfig` that `tune` recommends; None before, and where no cache met the target."""
    remark: str = ""
    """What a user of these settings should know."""

    @property
    def file_name(self) -> str:
        """The same for the same model and kind of run."""
        key = json_digest([self.model.model_dump(mode="json"), self.run.model_dump(mode="json")])
        return f"{self.model.transformer}-{self.run.steps}-steps-{key}.json"

    def save(self, path: Path) -> Path:
        """Write the profile, in one go, and return the path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
        return path

    def settings_for(self, config: TeaCacheConfig) -> TeaCacheConfig:
        """`config` with what it leaves at its default taken from this profile.

        Recommended settings belong together: a gate of one's own takes none of them but the calibration.
        """
        own = {
            name: value
            for name in type(config).model_fields
            if name != "profile" and (value := getattr(config, name)) != type(config).model_fields[name].default
        }
        recommended = dict(self.settings or {})
        wanted = own.get("gate", "distance" if "rel_l1_thresh" in own else recommended.get("gate"))
        if wanted != recommended.get("gate"):
            recommended = {}
        merged = TeaCacheConfig.model_validate({**recommended, **own})
        found = self.calibration.get("output" if merged.chosen_prediction.startswith("output") else "residual")
        if found is None or merged.gate != "distance" or merged.coefficients is not None:
            return merged
        fitted = {"coefficients": found.coefficients, "fitted_range": found.fitted_range}
        return merged.model_copy(update=fitted)

    def watched(self, say: Callable[[str], None]) -> Callable[[StepCache], StepCache]:
        """Has every run told that is of another kind than the runs of this profile."""
        watch = _Watch(self, say)
        return lambda cache: replace(cache, make_gate=lambda: _WatchedGate(cache.make_gate(), watch))


def load_profile(path: Path) -> Profile:
    """Read a profile; raises ConfigError where there is none or it is not one."""
    try:
        return Profile.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(
            f"teacache.profile: there is no file {path}; make one with `dittocache calibrate` or `dittocache tune`"
        ) from error
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"teacache.profile: {path} is no profile of this version ({str(error).splitlines()[0]}); make it again "
            "with `dittocache calibrate` or `dittocache tune`"
        ) from error


def profiles_folder() -> Path:
    """Where profiles of all runs lie."""
    if os.environ.get(FOLDER_VARIABLE):
        return Path(os.environ[FOLDER_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dittocache" / "profiles"


def profile_for(config: TeaCacheConfig, denoiser: Denoiser, say: Callable[[str], None]) -> Profile:
    """The profile that `config.profile` names; what differs between its model and this one is said.

    Raises ConfigError where there is none, StepCacheError where it is of another architecture.
    """
    now = fingerprint(denoiser)
    if config.profile == AUTO:
        path, profile = _nearest(now, config.num_inference_steps)
    else:
        path = Path(config.profile or "")
        profile = load_profile(path)
    if (profile.model.transformer, profile.model.config) != (now.transformer, now.config):
        raise StepCacheError(
            f"the profile {path} was made for a {profile.model.transformer} of another configuration than this "
            f"{now.transformer}; make one for this model with `dittocache calibrate`"
        )
    different = profile.model.differences(now)
    if different:
        say(f"the profile {path} was made with another model: {'; '.join(different)} differ. Calibrate again")
    if profile.remark:
        say(profile.remark)
    return profile


def known_profile(model: ModelPrint, run: RunPrint) -> Profile | None:
    """The profile of this very model and kind of run, None where there is none."""
    asked = Profile(made=datetime.now().astimezone(), model=model, run=run)
    path = profiles_folder() / asked.file_name
    return load_profile(path) if path.is_file() else None


def _nearest(now: ModelPrint, steps: int | None) -> tuple[Path, Profile]:
    """Of the profiles for this architecture the one with the fewest differences, of these steps, the newest."""
    folder = profiles_folder()
    found: list[tuple[Any, Path, Profile]] = []
    for path in sorted(folder.glob(f"{now.transformer}-*.json")):
        profile = load_profile(path)
        if profile.model.config == now.config:
            other_steps = steps is not None and profile.run.steps != steps
            rank = (len(profile.model.differences(now)), other_steps, -profile.made.timestamp())
            found.append((rank, path, profile))
    if not found:
        raise ConfigError(
            f"teacache.profile is 'auto', but {folder} holds none for this {now.transformer}; make one with "
            "`dittocache calibrate` or `dittocache tune`, or give the path of one"
        )
    _, path, profile = min(found, key=lambda one: one[0])
    return path, profile


class _Watch:
    """Compares runs with those of the profile; each difference is said once."""

    def __init__(self, profile: Profile, say: Callable[[str], None]) -> None:
        self._known = profile.run
        self._say = say
        self._said: set[str] = set()
        self._run = -1
        self._branches: set[str] = set()
        self._done = False

    def see(self, call: DenoisingCall) -> None:
        """Look at the first steps of a run."""
        if call.run != self._run:
            self._run, self._branches, self._done = call.run, set(), False
            found: Mapping[str, tuple[int | None, int | None]] = {
                "steps": (self._known.steps, call.steps),
                "noise tokens a picture (its size)": (
                    self._known.tokens,
                    None if call.layout is None else call.layout.noise,
                ),
            }
            for name, (known, now) in found.items():
                if known is not None and now is not None and known != now:
                    self._differs(f"{known} {name}, this run has {now}")
        if call.step == 0:
            self._branches.add(call.branch)
        elif not self._done:
            self._done = True
            if self._branches and len(self._branches) != self._known.branches:
                self._differs(f"{self._known.branches} passes a step (guidance), this run has {len(self._branches)}")

    def _differs(self, words: str) -> None:
        if words not in self._said:
            self._said.add(words)
            self._say(f"the profile was made with {words}. Calibrate or tune again for these runs")


class _WatchedGate:
    """A gate, and a look at the run that it decides on."""

    def __init__(self, gate: Gate, watch: _Watch) -> None:
        self.limits = gate.limits
        self.needs_steps = gate.needs_steps
        self._gate = gate
        self._watch = watch

    @property
    def bytes_held(self) -> int:
        return self._gate.bytes_held

    def decide(self, step: StepView) -> Sequence[Decision]:
        self._watch.see(step.call)
        return self._gate.decide(step)

    def observe(self, step: StepView, prediction: Prediction, value: torch.Tensor, rows: Sequence[int]) -> None:
        self._gate.observe(step, prediction, value, rows)
