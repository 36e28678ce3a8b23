"""What a training will hold in memory, computed before anything is loaded.

The transformer is built without storage (on the `meta` device) from the checkpoint's config, given the same LoRA, and
asked for what it would hold: the numbers of weights, LoRA, gradients and optimizer are exact, the activations are what
one forward pass saves for the backward pass. The headers of the checkpoint's safetensors files tell whether all of the
weights are there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dittocache.errors import ModelError
from dittocache.families.base import Family, Tensors, TrainingInputs
from dittocache.families.loading import diffusers_class
from dittocache.training.config import TrainConfig
from dittocache.training.frozen_base import store_in_fp8
from dittocache.training.lora import add_lora
from dittocache.training.loss import velocity_loss
from dittocache.training.optimizers import make_optimizer

EIGHT_BIT_ADAM = 2 + 2 * 4 / 256  # bytes a parameter: two moments, each with one float32 scale for 256 values
PRODIGY = 4 * 4  # bytes a parameter: two moments, s and the initial weight, in float32
NF4 = 0.5 + 4 / 64  # bytes a weight: 4 bit, and one float32 scale for 64 weights
TEXT_TOKENS = 512  # where the prompts' true lengths are not known yet


@dataclass(frozen=True)
class BatchSize:
    """Tokens of the largest sample: noise N, references R and text T, and the pictures' shapes in packed latents.

    `img_shapes` holds (frames, height, width) of the target and of each reference.
    """

    img_shapes: tuple[tuple[int, ...], ...]
    text: int = TEXT_TOKENS

    @property
    def noise(self) -> int:
        """Tokens of the target."""
        frames, height, width = self.img_shapes[0]
        return frames * height * width

    @property
    def references(self) -> int:
        """Tokens of all references."""
        return sum(frames * height * width for frames, height, width in self.img_shapes[1:])

    @property
    def total(self) -> int:
        """All tokens."""
        return self.noise + self.references + self.text


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that training holds on the device.

    Attributes:
        weights: frozen weights, as they are held.
        lora: its parameters.
        gradients: of them.
        optimizer: its moments.
        average: the moving average of the LoRA.
        activations: kept for the backward pass, an estimate.
        offloaded: True where the weights stay in the machine's memory.
        notes: what the reader should know.
    """

    weights: int
    lora: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    offloaded: bool = False
    notes: tuple[str, ...] = ()

    @property
    def device_total(self) -> int:
        """All that the device holds."""
        held = self.lora + self.gradients + self.optimizer + self.average + self.activations
        return held if self.offloaded else held + self.weights

    def describe(self) -> str:
        """One line for the user."""
        where = " (in the machine's memory)" if self.offloaded else ""
        parts = [f"weights {_gigabytes(self.weights)}{where}", f"LoRA {_gigabytes(self.lora)}"]
        parts += [f"gradients {_gigabytes(self.gradients)}", f"optimizer {_gigabytes(self.optimizer)}"]
        parts += [f"average {_gigabytes(self.average)}"] if self.average else []
        parts += [f"activations about {_gigabytes(self.activations)}"]
        return "; ".join(
            [f"memory for training about {_gigabytes(self.device_total)}: {', '.join(parts)}", *self.notes]
        )

    def as_dict(self) -> dict[str, Any]:
        """For events."""
        names = ("weights", "lora", "gradients", "optimizer", "average", "activations", "device_total")
        return {name: getattr(self, name) for name in names} | {"notes": list(self.notes)}


def plan_memory(folder: Path, family: Family, config: TrainConfig, dtype: torch.dtype, size: BatchSize) -> MemoryPlan:
    """The plan for training on the checkpoint in `folder` with samples of `size`.

    Raises ModelError where the checkpoint has no transformer's config or its weights are incomplete.
    """
    from accelerate import init_empty_weights

    transformer_class = diffusers_class(family.transformer.class_name)
    try:
        settings = transformer_class.load_config(folder, subfolder="transformer")
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} has no config of a transformer: {error}") from error
    with init_empty_weights():
        transformer = transformer_class.from_config(settings)
        for parameter in transformer.parameters():
            parameter.data = parameter.data.to(dtype)
        notes = _missing_weights(folder / "transformer", transformer)
        whole = sum(parameter.nbytes for parameter in transformer.parameters())
        add_lora(transformer, family, config)
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    lora = sum(parameter.nbytes for parameter in parameters)
    optimizer, optimizer_note = _optimizer_bytes(parameters, config)
    activations = _activation_bytes(transformer, family, config, dtype, size)
    if config.base_quantization != "none":  # weights in the computing format: of one block, or of all (`load_frozen`)
        blocks = len(family.transformer.blocks(transformer))
        activations += whole // blocks if config.gradient_checkpointing else whole
    return MemoryPlan(
        weights=_weight_bytes(transformer, config, dtype, whole),
        lora=lora,
        gradients=lora,
        optimizer=optimizer,
        average=lora if config.ema_decay is not None else 0,
        activations=activations,
        offloaded=config.offload == "group",
        notes=(*notes, *optimizer_note),
    )


def safetensors_sizes(folder: Path) -> dict[str, int]:
    """Number of values of every tensor in the folder's safetensors files, from their headers alone.

    Raises ModelError naming a file that is no safetensors file.
    """
    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as stream:
                header: Mapping[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        except (OSError, ValueError, MemoryError, OverflowError) as error:
            raise ModelError(f"{path} is damaged ({error}); download the checkpoint again") from error
        for name, entry in header.items():
            if name != "__metadata__":
                sizes[name] = int(torch.Size(entry["shape"]).numel())
    return sizes


def _missing_weights(folder: Path, transformer: Any) -> tuple[str, ...]:
    """A note where the files hold another number of values than the transformer has."""
    expected = {name: parameter.numel() for name, parameter in transformer.named_parameters()}
    found = safetensors_sizes(folder)
    missing = sorted(name for name, size in expected.items() if found.get(name) != size)
    if not missing or not found:
        return ()
    return (f"{len(missing)} of {len(expected)} weights are not in the files of {folder}, the first {missing[0]}",)


def _weight_bytes(transformer: Any, config: TrainConfig, dtype: torch.dtype, whole: int) -> int:
    """Bytes of the frozen weights as they are held."""
    if config.base_quantization == "none":
        return whole
    if config.base_quantization == "fp8":
        store_in_fp8(transformer, dtype)
        return sum(parameter.nbytes for parameter in transformer.parameters() if not parameter.requires_grad)
    linear = sum(module.weight.numel() for module in transformer.modules() if _is_frozen_linear(module))
    a_weight = NF4 if config.base_quantization == "nf4" else 1.0
    return int(whole - linear * (dtype.itemsize - a_weight))


def _is_frozen_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) and not module.weight.requires_grad


def _optimizer_bytes(parameters: list[torch.nn.Parameter], config: TrainConfig) -> tuple[int, tuple[str, ...]]:
    """Bytes of the optimizer's state: by one step without storage where that can be done, else by a rule."""
    count = sum(parameter.numel() for parameter in parameters)
    rules = {"adamw8bit": EIGHT_BIT_ADAM, "prodigy": PRODIGY}
    if config.optimizer in rules:
        return int(count * rules[config.optimizer]), ()
    stand_ins = [torch.nn.Parameter(torch.empty_like(parameter)) for parameter in parameters]
    for stand_in in stand_ins:
        stand_in.grad = torch.empty_like(stand_in)
    optimizer = make_optimizer(stand_ins, config)
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError):  # it looks at values, which are not there
        return 8 * count, (f"{config.optimizer} is taken to need what AdamW needs",)
    state = [value for entries in optimizer.state.values() for value in entries.values()]
    return sum(value.nbytes for value in state if isinstance(value, torch.Tensor)), ()


def _activation_bytes(
    transformer: Any, family: Family, config: TrainConfig, dtype: torch.dtype, size: BatchSize
) -> int:
    """Bytes that one forward pass keeps for the backward pass."""
    inputs = family.training_inputs(
        [_stand_in_sample(transformer.config, size)] * config.batch_size,
        torch.zeros(config.batch_size, size.noise, transformer.config.in_channels),
        torch.zeros(config.batch_size),
    )
    inputs = _without_storage(inputs)
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in transformer.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # Attention without storage falls back to arithmetic that keeps its weights, which no kernel in use does.
        scores = tensor.ndim >= 3 and tensor.shape[-2:] == (size.total, size.total)
        storage = tensor.untyped_storage()
        if not scores and storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    transformer.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        velocity_loss(transformer, inputs, dtype)
    everything = sum(storage.nbytes() for storage in kept.values())
    if not config.gradient_checkpointing:
        return everything
    blocks = len(family.transformer.blocks(transformer))
    width = int(transformer.config.num_attention_heads * transformer.config.attention_head_dim)
    between = blocks * config.batch_size * size.total * width * dtype.itemsize
    return between + everything // blocks  # the inputs of all blocks, and one block while it is computed again


def _stand_in_sample(config: Any, size: BatchSize) -> Tensors:
    """Every artifact that a family may ask for, in the shapes of `size`; a family takes what it needs."""
    channels = config.in_channels
    pooled = getattr(config, "pooled_projection_dim", None) or 1
    return {
        "image_latents": torch.zeros(size.noise, channels),
        "control_latents": torch.zeros(size.references, channels),
        "prompt_embeds": torch.zeros(size.text, config.joint_attention_dim),
        "prompt_embeds_mask": torch.ones(size.text, dtype=torch.bool),
        "pooled_prompt_embeds": torch.zeros(pooled),
        "img_shapes": torch.tensor(size.img_shapes, dtype=torch.int32),
    }


def _without_storage(inputs: TrainingInputs) -> TrainingInputs:
    kwargs = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in inputs.transformer_kwargs.items()
    }
    return TrainingInputs(kwargs, inputs.target.to("meta"), inputs.select)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
