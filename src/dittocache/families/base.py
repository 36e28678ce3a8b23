"""What a model family must say on its encoding side, so that no other room has to know a model.

`Family` says which tensors a training sample needs, what determines them, and how the diffusers pipeline computes them.
How its denoiser is laid out stands in `transformer_side`.

Shapes: B batch, N noise tokens, R reference tokens, T text tokens, C latent channels after packing (64).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from dittocache.data.pictures import picture_size
from dittocache.data.sample import Sample
from dittocache.families.pictures import PictureRequest, Pictures, resized_picture
from dittocache.families.transformer_side import TransformerAdapter

Tensors = dict[str, torch.Tensor]
Batching = Literal["exact", "together"]


@dataclass(frozen=True)
class Sizes:
    """The sides, in pixels, of the squares whose area pictures are resized to (their aspect ratio is kept).

    Attributes:
        resolution: target and (by default) control pictures for the VAE; 1024 for the real checkpoints.
        condition_resolution: pictures shown to the vision-language text encoder; 384 for Edit-Plus.
    """

    resolution: int = 1024
    condition_resolution: int = 384


@dataclass(frozen=True)
class ArtifactInput:
    """One input that determines an artifact, in order: a file by its content, or a text by its characters."""

    role: str
    file: Path | None = None
    text: str | None = None


@dataclass(frozen=True)
class Artifact:
    """A tensor that a sample needs, and everything that determines it. The only source of truth for keys.

    Attributes:
        name: `image_latents`, `control_latents`, `prompt_embeds`, `prompt_embeds_mask`, ...
        encoder: the pipeline component that computes it (`vae`, `text_encoder`, ...); None for plain facts
            such as `img_shapes`.
        inputs: the contents it is computed from, in order.
        transform: resolved settings of the way from file to encoder (sizes, resampling, template); JSON values only.
    """

    name: str
    encoder: str | None
    inputs: tuple[ArtifactInput, ...]
    transform: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class TrainingInputs:
    """One batch as the transformer wants it.

    Attributes:
        transformer_kwargs: keyword arguments of the transformer's forward, `timestep` included.
        target: flow-matching target, velocity noise - latents, `(B, N, C)`.
        select: takes the transformer's output, `(B, N + R, C)` or where references are isolated `(B, N, C)`, to the
            predicted velocity `(B, N, C)`.
    """

    transformer_kwargs: dict[str, Any]
    target: torch.Tensor
    select: Callable[[torch.Tensor], torch.Tensor]


class Family(Protocol):
    """The encoding side of a model family.

    Attributes:
        name: the word used in configs: `qwen-image-edit-plus`, `flux`, ...
        pipeline_class_name: the diffusers pipeline, and the spec's `model_type`: `QwenImageEditPlusPipeline`.
        encoders: pipeline components that compute artifacts, each with the components it needs beside it, e.g.
            `{"vae": (), "text_encoder": ("tokenizer", "processor")}`.
        size_multiple: the sides of target pictures must be multiples of this many pixels.
        lora_targets: regular expressions of the linear layers that a LoRA is added to; each says how a module's name
            ends, from a dot on (`to_q`, `ff.net.2`).
    """

    name: str
    pipeline_class_name: str
    encoders: Mapping[str, tuple[str, ...]]
    size_multiple: int
    lora_targets: tuple[str, ...]

    @property
    def transformer(self) -> TransformerAdapter:
        """The transformer side."""
        ...

    def artifacts(
        self, sample: Sample, sizes: Sizes, size_of: Callable[[Path], tuple[int, int]] = picture_size
    ) -> Sequence[Artifact]:
        """The artifacts of `sample`, each with its encoder and the inputs that determine it.

        `size_of` gives a picture's upright (width, height); a caller that remembers sizes saves reading headers.
        """
        ...

    def load_pipeline(
        self, model: str, components: Collection[str], dtype: torch.dtype, device: str | torch.device
    ) -> Any:
        """A diffusers pipeline of `pipeline_class_name` that holds `components` and nothing else in memory.

        Raises ModelError when `model` (a folder or hub id) is missing or not of this family.
        """
        ...

    def pictures(
        self, encoder: str | None, sample: Sample, sizes: Sizes, wanted: Collection[str] | None = None
    ) -> Sequence[PictureRequest]:
        """The pictures that `encode` will ask for, so that they can be decoded ahead."""
        ...

    def encode(
        self,
        pipe: Any,
        encoder: str | None,
        samples: Sequence[Sample],
        sizes: Sizes,
        *,
        wanted: Sequence[Collection[str]] | None = None,
        pictures: Pictures = resized_picture,
        together: bool = False,
    ) -> list[Tensors]:
        """The artifacts that `encoder` computes for each sample, by the pipeline's own methods, without a batch axis.

        `image_latents` `(N, C)`, `control_latents` `(R, C)`, `prompt_embeds` `(T, D)`, `prompt_embeds_mask` `(T,)`
        bool, `empty_prompt_embeds*` alike, `img_shapes` `(1 + controls, 3)` int32: frames, height and width in packed
        latents.

        Args:
            encoder: None gives the artifacts that need no encoder.
            wanted: for each sample the names of the artifacts to compute, all when None: names that another encoder
                computes are passed over.
            pictures: gives decoded and resized pictures.
            together: False passes pictures and prompts one by one, exactly as the pipeline does, so that a tensor
                does not depend on its company. True passes pictures of one size, and prompts padded to one length,
                together; the tensors differ by rounding.
        """
        ...

    def training_inputs(self, batch: Sequence[Tensors], noise: torch.Tensor, sigmas: torch.Tensor) -> TrainingInputs:
        """Collate samples' artifacts and mix in `noise` `(B, N, C)` at `sigmas` `(B,)`, on the device of `noise`."""
        ...
