"""What a transformer with a LoRA would hold in memory, counted on a copy without storage (on the `meta` device)."""

from __future__ import annotations

import json
from collections import Counter
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
class TransformerFacts:
    """Counts that do not depend on how the frozen weights are held; in bytes but for `blocks`.

    Attributes:
        weights: frozen weights in the computing format.
        weights_in_fp8: the same with diffusers' layerwise casting.
        linear: of `weights`, those of linear layers, which nf4 and int8 make smaller.
        element: of one weight in the computing format.
        blocks: how many transformer blocks there are.
        lora: the LoRA's parameters.
        optimizer: the optimizer's state.
        kept: what a forward pass of one batch keeps for the backward pass.
        between: the inputs of all blocks, which is what gradient checkpointing keeps.
        largest: the largest tensor that is kept.
        notes: what the user should know.
    """

    weights: int
    weights_in_fp8: int
    linear: int
    element: int
    blocks: int
    lora: int
    optimizer: int
    kept: int
    between: int
    largest: int
    notes: tuple[str, ...] = ()


def transformer_facts(
    folder: Path, family: Family, config: TrainConfig, dtype: torch.dtype, size: BatchSize
) -> TransformerFacts:
    """The counts for the checkpoint in `folder` and batches of samples of `size`; loads no weights.

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
        weights = _bytes(transformer.parameters())
        linear = sum(one.weight.nbytes for one in transformer.modules() if isinstance(one, torch.nn.Linear))
        parameters = add_lora(transformer, family, config)
    optimizer, optimizer_note = _optimizer_bytes(parameters, config)
    kept, largest = _kept_bytes(transformer, family, config, dtype, size)
    blocks = len(family.transformer.blocks(transformer))
    width = int(transformer.config.num_attention_heads * transformer.config.attention_head_dim)
    store_in_fp8(transformer, dtype)
    return TransformerFacts(
        weights=weights,
        weights_in_fp8=_bytes(one for one in transformer.parameters() if not one.requires_grad),
        linear=linear,
        element=dtype.itemsize,
        blocks=blocks,
        lora=_bytes(parameters),
        optimizer=optimizer,
        kept=kept,
        between=blocks * config.batch_size * size.total * width * dtype.itemsize,
        largest=largest,
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


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _missing_weights(folder: Path, transformer: Any) -> tuple[str, ...]:
    """A note where the files hold another number of values than the transformer has."""
    expected = {name: parameter.numel() for name, parameter in transformer.named_parameters()}
    found = safetensors_sizes(folder)
    missing = sorted(name for name, size in expected.items() if found.get(name) != size)
    if not missing or not found:
        return ()
    return (f"{len(missing)} of {len(expected)} weights are not in the files of {folder}, the first {missing[0]}",)


def _optimizer_bytes(parameters: list[torch.nn.Parameter], config: TrainConfig) -> tuple[int, tuple[str, ...]]:
    """Bytes of the optimizer's state: by one step without storage where that can be done, else by a rule."""
    count = sum(parameter.numel() for parameter in parameters)
    rules = {"adamw8bit": EIGHT_BIT_ADAM, "prodigy": PRODIGY}
    if config.optimizer in rules:
        return int(count * rules[config.optimizer]), ()
    # One step with one parameter of each shape: hundreds of layers are alike.
    alike = Counter((parameter.shape, parameter.dtype) for parameter in parameters)
    stand_ins = {
        torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")): (shape, dtype) for shape, dtype in alike
    }
    for stand_in in stand_ins:
        stand_in.grad = torch.empty_like(stand_in)
    optimizer = make_optimizer(list(stand_ins), config)
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError):  # it looks at values, which are not there
        return 8 * count, (f"{config.optimizer} is taken to need what AdamW needs",)
    total = 0
    for stand_in, kind in stand_ins.items():
        state = optimizer.state.get(stand_in, {})
        total += alike[kind] * _bytes(value for value in state.values() if isinstance(value, torch.Tensor))
    return total, ()


def _kept_bytes(
    transformer: Any, family: Family, config: TrainConfig, dtype: torch.dtype, size: BatchSize
) -> tuple[int, int]:
    """Bytes that one forward pass keeps for the backward pass, and those of the largest tensor among them."""
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
    sizes = [storage.nbytes() for storage in kept.values()]
    return sum(sizes), max(sizes, default=0)


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
