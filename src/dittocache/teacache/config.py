"""Settings of the step cache, with the spec's names and aliases."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import AliasChoices, ConfigDict, Field, FiniteFloat, field_validator, model_validator

from dittocache.settings import Settings


class TeaCacheConfig(Settings):
    """The step cache: skip the transformer blocks in steps that can be told from the ones before.

    Without settings it is TeaCache as published (https://liewfeng.github.io/TeaCache/): a gate on the accumulated
    distance of the blocks' input, and the last residual once more on a skipped step. Both can be chosen apart.
    """

    model_config = ConfigDict(populate_by_name=True)

    rel_l1_thresh: float = Field(
        default=0.2, ge=0, allow_inf_nan=False, validation_alias=AliasChoices("rel_l1_thresh", "teacache_thresh")
    )
    """Accumulated rescaled distance up to which the cached residual is reused; 0 computes every step."""

    gate: Literal["distance", "error", "schedule"] = "distance"
    """What decides: the spec's `distance`; `error`, the measured error of the prediction, which needs no calibration;
    or a fixed `schedule` of computed steps."""

    prediction: Literal["residual", "residual_linear", "output", "output_linear", "noise", "noise_linear"] | None = None
    """What a skipped step uses: the last residual of the blocks, the last output (velocity), the last noise that the
    model saw in the latents, or the line through the last two, continued in sigma. When left out, `residual` with the
    distance gate; with the others `noise_linear`, or `output_linear` where the model's input does not hold the latents
    that its output moves."""

    error_tolerance: float = Field(default=0.001, ge=0, allow_inf_nan=False)
    """Relative error of what is predicted (the noise, if `prediction` says nothing else) times the change of sigma that
    skipped steps may add up to (`gate: error`); 0 computes every step."""

    schedule: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Steps that are computed, counted from 0 (`gate: schedule`); the others are skipped."""

    per_sample: bool = True
    """Decide for each sample of a batch by itself; else the batch is computed as soon as one sample needs it."""

    coefficients: tuple[FiniteFloat, ...] | None = Field(default=None, min_length=1)
    """Rescaling polynomial, highest power first, of any degree; the family's default when left out."""

    fitted_range: tuple[FiniteFloat, FiniteFloat] | None = None
    """Distances (lowest, highest) that `coefficients` were fitted on; a step farther away is computed."""

    model_type: str | None = None
    """Pipeline class name (`QwenImageEditPlusPipeline`); found from the transformer when left out."""

    profile: str | None = None
    """What `dittocache calibrate` and `tune` found for this model: `auto` looks it up by the model, or its file. It
    takes the place of settings that are left at their defaults."""

    ret_steps: int = Field(default=1, ge=1)
    """First steps that are always computed."""

    cutoff_steps: int = Field(default=1, ge=1)
    """Last steps that are always computed."""

    max_consecutive_skips: int = Field(default=4, ge=1)
    """A step is computed after so many skipped ones, whatever the distance."""

    num_inference_steps: int | None = Field(default=None, ge=1)
    """Number of steps of a run, needed only where it cannot be read from the pipeline's scheduler."""

    @property
    def chosen_prediction(self) -> str:
        """The prediction, with what it is when left out."""
        return self.prediction or ("residual" if self.gate == "distance" else "noise_linear")

    @property
    def is_as_published(self) -> bool:
        """Whether gate and prediction are those of TeaCache."""
        return self.gate == "distance" and self.chosen_prediction == "residual"

    @property
    def in_short(self) -> str:
        """The dial that counts, in a few words."""
        if self.profile is not None:
            return f"profile {self.profile}"
        dials = {
            "distance": f"rel_l1_thresh {self.rel_l1_thresh:g}",
            "error": f"error_tolerance {self.error_tolerance:g}",
            "schedule": f"{len(self.schedule or ())} steps computed",
        }
        return dials[self.gate]

    @property
    def needs_extractor(self) -> bool:
        """Whether the model must be taken apart: for its signal, or for the residual of its blocks."""
        return self.gate == "distance" or self.chosen_prediction.startswith("residual")

    @property
    def enabled(self) -> bool:
        """Whether any step may be skipped."""
        return {"distance": self.rel_l1_thresh > 0, "error": self.error_tolerance > 0, "schedule": True}[self.gate]

    @field_validator("schedule", mode="after")
    @classmethod
    def _steps_are_counted_from_0(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (min(value) != 0 or len(set(value)) != len(value)):
            raise ValueError(f"schedule must list steps once each, step 0 among them, found {list(value)}")
        return None if value is None else tuple(sorted(value))

    @model_validator(mode="after")
    def _schedule_belongs_to_its_gate(self) -> Self:
        if (self.schedule is None) == (self.gate == "schedule"):
            found = "no schedule" if self.schedule is None else f"a schedule with gate {self.gate!r}"
            raise ValueError(f"gate 'schedule' and a schedule belong together, found {found}")
        return self

    @model_validator(mode="after")
    def _range_is_ordered(self) -> Self:
        if self.fitted_range is not None and not 0 <= self.fitted_range[0] < self.fitted_range[1]:
            raise ValueError(
                f"fitted_range must be (lowest, highest) distance with 0 <= lowest < highest, found {self.fitted_range}"
            )
        return self
