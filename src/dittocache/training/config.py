"""Settings of the `train` section."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from dittocache.settings import Settings


class TrainConfig(Settings):
    """LoRA fine-tuning."""

    steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""

    epochs: int | None = Field(default=None, ge=1)
    """Passes over the data set, repeats included, in place of `steps`; where both are given, what is reached first."""

    batch_size: int = Field(default=1, ge=1)
    """Samples that pass the transformer at once, on each process."""

    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Batches whose gradients make one optimizer step."""

    processes: int = Field(default=1, ge=1)
    """Processes that share the work of each step, one a GPU; a step then takes as many times the samples."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate; 1.0 is usual for Prodigy."""

    optimizer: str = Field(default="adamw", pattern=r"^(adamw|adamw8bit|prodigy|[A-Za-z_]\w*(\.[A-Za-z_]\w*)+)$")
    """`adamw`, `adamw8bit`, `prodigy`, or the path of an optimizer's class: `torch.optim.SGD`."""

    optimizer_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer's class: `{eps: 1.0e-8}`."""

    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay; the optimizer's own default when left out."""

    betas: tuple[float, float] | None = None
    """Decay of the moments, each in [0, 1); the optimizer's own default when left out."""

    lr_schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = "cosine"
    """How the learning rate goes on after the warm-up."""

    lr_cycles: int = Field(default=1, ge=1)
    """Cycles of `cosine_with_restarts`."""

    lr_power: float = Field(default=1.0, gt=0)
    """Power of `polynomial`."""

    warmup_steps: int = Field(default=10, ge=0)
    """Steps of linear warm-up; at most half of the run."""

    rank: int = Field(default=16, ge=1)
    """LoRA rank."""

    alpha: int | None = Field(default=None, ge=1)
    """LoRA alpha; the rank when left out."""

    lora_targets: list[str] | str | None = Field(default=None, min_length=1)
    """Layers that get a LoRA: ends of their names, `[to_q, to_k, to_v, to_out.0]`, or one regular expression for the
    whole name; the family's own when left out."""

    lora_init: Literal["uniform", "gaussian"] = "uniform"
    """How the LoRA's first factors are drawn; the second are zero in either case."""

    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the LoRA's inputs that is set to zero in each step."""

    reference_visibility: Literal["full", "isolated"] = "full"
    """What reference tokens see; `isolated`: references only, at t = 0, so that a reference KV cache is exact."""

    self_distillation: float = Field(default=0.0, ge=0, le=1)
    """Share of the target that is the model's own velocity without the LoRA and with full visibility, for
    `reference_visibility: isolated`; 1: learn to read isolated references, and nothing from the targets."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient clipping."""

    timestep_sampling: Literal["uniform", "logit_normal", "shifted", "resolution_shifted"] = "logit_normal"
    """How sigma is drawn; `resolution_shifted`: logit-normal, moved to noise the further the larger the picture."""

    logit_mean: float = 0.0
    """Mean of the logit-normal draws."""

    logit_std: float = Field(default=1.0, gt=0)
    """Standard deviation of the logit-normal draws."""

    timestep_shift: float = Field(default=1.0, gt=0)
    """Shift s of `shifted`: sigma = s u / (1 + (s - 1) u)."""

    shift_tokens: tuple[int, int] = (256, 4096)
    """Picture tokens at which `resolution_shifted` has its least and its largest shift; Qwen-Image: 256, 8192."""

    shift_exponents: tuple[float, float] = (0.5, 1.15)
    """Natural logarithms of the shift there; Qwen-Image: 0.5, 0.9."""

    loss_weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    """Weight of the loss by sigma, as for Stable Diffusion 3."""

    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of a moving average of the LoRA's weights, 0.99 to 0.9999; the average is then the LoRA that is saved."""

    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Run the LoRA too in 16 bit, by autocast: less memory; `fp16` needs a GPU and scales the loss."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: a third more time, a fraction of the memory."""

    base_quantization: Literal["none", "fp8", "nf4", "int8"] = "none"
    """How the frozen weights are held; `nf4` needs bitsandbytes, `int8` bitsandbytes or torchao."""

    offload: Literal["none", "group"] = "none"
    """`group` keeps the frozen blocks in the machine's memory and one at a time on the GPU; much slower."""

    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""

    keep_checkpoints: int | None = Field(default=None, ge=1)
    """Newest checkpoints to keep; all when left out."""

    validate_every: int | None = Field(default=None, ge=1)
    """Steps between pictures made with the LoRA so far, in `samples/step-N`; none when left out."""

    validation_prompts: list[str] = Field(default_factory=list)
    """Prompts of these pictures; the held-out set's, or `generate.prompt`, when left out."""

    validation_pictures: int = Field(default=2, ge=1)
    """Pictures to make each time, at most."""

    log_with: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    """Loggers beside the run's own events."""

    seed: int = 0
    """Seed of noise, timesteps and sample order."""

    @model_validator(mode="before")
    @classmethod
    def _no_steps_are_the_default(cls, settings: Any) -> Any:
        if not isinstance(settings, dict) or settings.get("epochs") is None or settings.get("steps") is not None:
            return settings
        return {name: value for name, value in settings.items() if name != "steps"}

    @property
    def most_steps(self) -> int | None:
        """Where training ends at the latest; None where `epochs` alone decide."""
        return None if self.epochs is not None and "steps" not in self.model_fields_set else self.steps

    @model_serializer(mode="wrap")
    def _saved_as_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `steps` where `epochs` alone count, so that what was saved says the same when it is read again."""
        settings: dict[str, Any] = handler(self)
        if self.most_steps is None:
            settings.pop("steps", None)
        return settings

    @field_validator("log_with", mode="before")
    @classmethod
    def _one_logger_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("optimizer_args")
    @classmethod
    def _numbers_are_numbers(cls, value: dict[str, Any]) -> dict[str, Any]:
        """YAML reads 1e-8 as text, for want of a dot."""
        return {name: _number(one) if isinstance(one, str) else one for name, one in value.items()}

    @field_validator("betas")
    @classmethod
    def _betas_are_decays(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not all(0 <= beta < 1 for beta in value):
            raise ValueError("two numbers in [0, 1)")
        return value

    @model_validator(mode="after")
    def _a_teacher_sees_more_than_its_pupil(self) -> Self:
        if self.self_distillation > 0 and self.reference_visibility != "isolated":
            raise ValueError(
                f"self_distillation: {self.self_distillation} needs reference_visibility: isolated; with full "
                "visibility the model without the LoRA is where training begins, and there is nothing to learn from it"
            )
        return self

    @model_validator(mode="after")
    def _offloaded_blocks_come_back_for_the_backward_pass(self) -> Self:
        if self.offload == "group" and not self.gradient_checkpointing:
            raise ValueError(
                "offload: group needs gradient_checkpointing: true; without it the backward pass would keep every "
                "block on the GPU"
            )
        return self


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
