"""Settings of the reference-image KV cache."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dittocache.settings import Settings

DRIFT_TOLERANCE = 0.1
Refresh = Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=0)], ...] | Literal["adaptive"] | None
Storage = Literal["auto", "native", "fp8", "modulated_input"]


class ReferenceKVConfig(Settings):
    """Keys and values of reference tokens are kept per block and reused in later steps."""

    mode: Literal["auto", "exact", "approx"] = "auto"
    """`exact`: references see references only, and their keys and values never change; an error where the checkpoint is
    not known to be trained for it. `approx`: they are refreshed. `auto`: exact where it is known to be right."""

    refresh: Refresh = None
    """When references are computed anew (`approx`): every so many computed steps (1: always, as stock), at named steps
    (`[0, 3, 6]`, counted from 0; `[0]`: never again), or `adaptive`, as soon as they are expected to have drifted
    beyond `drift_tolerance`. What is best for the model and the number of steps when left out."""

    extrapolate: bool | None = None
    """Between refreshes, continue the line through the last two in sigma. Where refreshes are regular when left out."""

    drift_tolerance: float = Field(default=DRIFT_TOLERANCE, gt=0)
    """Relative change of the keys that is let pass before the next refresh (`refresh: adaptive`)."""

    freeze_from_layer: int | None = Field(default=None, ge=1)
    """Keep references from this layer on, counted from 0, and compute them at every step in the layers before it; all
    layers keep them when left out. It saves memory; more refreshes buy more quality for the same time (8 layers, 8
    steps, PSNR of the bundled model: 50.9 dB with the first 4 live, 62.0 dB with 3 refreshes more instead)."""

    storage: Storage = "auto"
    """What is kept of a reference token. `native`: K and V as computed. `fp8`: both in 8 bits, half the memory, with a
    small error (so that exact references are not quite exact). `modulated_input`: what K and V are computed from, half
    the memory, no error, more work at each step. `auto`: `native`, or what fits `max_gb`."""
    offload: bool = False
    """Keep it in the host's memory; blocks fetch theirs ahead of time. With `max_gb` it is done where nothing else
    fits."""
    max_gb: float | None = Field(default=None, gt=0)
    """Most GB (of 10^9 bytes) on the device; the fastest way to keep references that fits is taken."""
    reuse_across_calls: bool = False
    """Keep them when a call of the pipeline ends, for the next one with the same references: other prompts, seeds,
    numbers of steps. Only where they are exact; the memory is free at the end of the session."""

    @property
    def in_short(self) -> str:
        """When references are refreshed, in a few words."""
        if self.mode == "exact":
            return "exact"
        if self.refresh is None:
            return "refreshed as usual"
        if self.refresh == "adaptive":
            return f"drift_tolerance {self.drift_tolerance:g}"
        if isinstance(self.refresh, int):
            return f"refresh {self.refresh}"
        return "first step only" if self.refresh == (0,) else f"refresh at steps {', '.join(map(str, self.refresh))}"

    @field_validator("refresh", mode="before")
    @classmethod
    def _refresh_is_no_switch(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(f"refresh is a number of steps, a list of steps or adaptive, found {value}")
        return value

    @field_validator("refresh", mode="after")
    @classmethod
    def _steps_are_counted_from_0(cls, value: Refresh) -> Refresh:
        if not isinstance(value, tuple):
            return value
        if 0 not in value or len(set(value)) != len(value):
            raise ValueError(f"refresh must list steps once each, step 0 among them, found {list(value)}")
        return tuple(sorted(value))

    @model_validator(mode="after")
    def _exact_references_never_change(self) -> Self:
        if self.mode != "exact":
            return self
        for name in ("refresh", "extrapolate", "drift_tolerance", "freeze_from_layer"):
            if getattr(self, name) not in (type(self).model_fields[name].default, False):
                raise ValueError(f"mode 'exact' keeps references as they are, so {name} says nothing; leave it out")
        return self

    @model_validator(mode="after")
    def _tolerance_belongs_to_adaptive(self) -> Self:
        if self.drift_tolerance != DRIFT_TOLERANCE and self.refresh != "adaptive":
            raise ValueError(
                f"drift_tolerance is read by refresh 'adaptive' only, found refresh {self.refresh!r}; set refresh: "
                "adaptive, or leave drift_tolerance out"
            )
        return self

    @model_validator(mode="after")
    def _a_line_needs_two_refreshes(self) -> Self:
        if self.extrapolate and (self.refresh == 1 or (isinstance(self.refresh, tuple) and len(self.refresh) < 2)):
            raise ValueError(
                "extrapolate continues the line through two refreshes into steps without one; refresh "
                f"{list(self.refresh) if isinstance(self.refresh, tuple) else self.refresh} leaves none to continue"
            )
        return self

    @model_validator(mode="after")
    def _there_is_something_to_store(self) -> Self:
        if self.refresh == 1 and (self.storage != "auto" or self.offload or self.max_gb is not None):
            raise ValueError(
                "refresh 1 computes references at every step and keeps nothing, so storage, offload and max_gb say "
                "nothing; leave them out, or refresh less often"
            )
        return self

    @model_validator(mode="after")
    def _only_exact_references_outlive_a_call(self) -> Self:
        if self.reuse_across_calls and self.mode == "approx":
            raise ValueError("reuse_across_calls is for exact references; mode 'approx' computes them for each call")
        return self
