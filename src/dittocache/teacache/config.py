"""Settings of the step cache, with the spec's names and aliases."""

from __future__ import annotations

from typing import Self

from pydantic import AliasChoices, ConfigDict, Field, FiniteFloat, model_validator

from dittocache.settings import Settings


class TeaCacheConfig(Settings):
    """TeaCache: skip the transformer blocks while the accumulated distance of their input stays small.

    Source: https://liewfeng.github.io/TeaCache/ and the project's TeaCache configuration guide.
    """

    model_config = ConfigDict(populate_by_name=True)

    rel_l1_thresh: float = Field(
        default=0.2, ge=0, allow_inf_nan=False, validation_alias=AliasChoices("rel_l1_thresh", "teacache_thresh")
    )
    """Accumulated rescaled distance up to which the cached residual is reused; 0 computes every step."""

    coefficients: tuple[FiniteFloat, ...] | None = Field(default=None, min_length=1)
    """Rescaling polynomial, highest power first, of any degree; the family's default when left out."""

    fitted_range: tuple[FiniteFloat, FiniteFloat] | None = None
    """Distances (lowest, highest) that `coefficients` were fitted on; a step farther away is computed."""

    model_type: str | None = None
    """Pipeline class name (`QwenImageEditPlusPipeline`); found from the transformer when left out."""

    ret_steps: int = Field(default=1, ge=1)
    """First steps that are always computed."""

    cutoff_steps: int = Field(default=1, ge=1)
    """Last steps that are always computed."""

    max_consecutive_skips: int = Field(default=4, ge=1)
    """A step is computed after so many skipped ones, whatever the distance."""

    num_inference_steps: int | None = Field(default=None, ge=1)
    """Number of steps of a run, needed only where it cannot be read from the pipeline's scheduler."""

    @model_validator(mode="after")
    def _range_is_ordered(self) -> Self:
        if self.fitted_range is not None and not 0 <= self.fitted_range[0] < self.fitted_range[1]:
            raise ValueError(
                f"fitted_range must be (lowest, highest) distance with 0 <= lowest < highest, found {self.fitted_range}"
            )
        return self
