"""The transformer side of a model: how the denoiser is laid out, for the two sampling caches.

`StepAdapter` says what the step cache must know (where the blocks are, what is compared, which tokens are noise),
`TransformerAdapter` besides how keys and values of reference tokens come about. A model that is only sampled from has
a `StepAdapter` and no encoding side.

Shapes: B batch, N noise tokens, R reference tokens, T text tokens, D width, C latent channels after
packing (64), H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn


@dataclass
class CacheContext:
    """What a TeaCache hook needs of one forward pass (the spec's interface).

    Attributes:
        modulated_input: tensor compared between steps, `(B, tokens, D)`.
        hidden_states: preprocessed input of the block stack, `(B, tokens, D)`.
        encoder_hidden_states: the text stream `(B, T, D)` of dual-stream models, else None.
        temb: timestep embedding.
        run_transformer_blocks: runs all blocks; returns `(hidden_states,)` or `(hidden_states, encoder_hidden_states)`.
        postprocess: final norm and projection; takes hidden_states, returns what the model's forward returns.
        extra_states: anything else an extractor wants to carry.
    """

    modulated_input: torch.Tensor
    hidden_states: torch.Tensor
    encoder_hidden_states: torch.Tensor | None
    temb: torch.Tensor
    run_transformer_blocks: Callable[[], tuple[torch.Tensor, ...]]
    postprocess: Callable[[torch.Tensor], Any]
    extra_states: dict[str, Any] | None = None

    def validate(self) -> None:
        """Raise TypeError or ValueError naming the first field that a hook could not work with."""
        for name in ("modulated_input", "hidden_states", "temb"):
            value = getattr(self, name)
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"CacheContext.{name} must be a torch.Tensor, found {type(value).__name__}")
        if self.encoder_hidden_states is not None and not isinstance(self.encoder_hidden_states, torch.Tensor):
            found = type(self.encoder_hidden_states).__name__
            raise TypeError(f"CacheContext.encoder_hidden_states must be a torch.Tensor or None, found {found}")
        for name in ("run_transformer_blocks", "postprocess"):
            if not callable(getattr(self, name)):
                raise TypeError(f"CacheContext.{name} must be callable, found {type(getattr(self, name)).__name__}")
        for name in ("modulated_input", "hidden_states"):
            if getattr(self, name).ndim == 0:
                raise ValueError(f"CacheContext.{name} must have a batch dimension, found shape ()")
        batches = {self.modulated_input.shape[0], self.hidden_states.shape[0]}
        if len(batches) != 1:
            raise ValueError(
                f"CacheContext.modulated_input has batch size {self.modulated_input.shape[0]}, "
                f"hidden_states has {self.hidden_states.shape[0]}; they must be equal"
            )


MODULATED_INPUT = "modulated input of the first block"


@dataclass(frozen=True)
class Polynomial:
    """Rescaling polynomial of TeaCache, highest power first, and where it may be trusted.

    Attributes:
        coefficients: of any degree.
        fitted_range: distances it was fitted on; beyond it the step is computed.
        source: who published it, and for which model.
        threshold: the one published with it.
        signal: whose distance it rescales; it is worthless for any other.
    """

    coefficients: tuple[float, ...]
    fitted_range: tuple[float, float] | None = None
    source: str = ""
    threshold: float | None = None
    signal: str = MODULATED_INPUT


@dataclass(frozen=True)
class TokenLayout:
    """How many of the image tokens are noise (N, first) and how many are references (R, after them).

    The noise is that of one picture, or of several layers of one.
    """

    noise: int
    reference: int
    layers: int = 1


@dataclass
class JointQKV:
    """Queries, keys and values of one attention call after norm and RoPE, each `(B, tokens, H, d)`.

    Text tokens stand first, then N noise, then R reference tokens. `prefix` counts the text tokens that came as a
    stream of their own and leave as one; 0 in single-stream blocks.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    prefix: int


class StepAdapter(Protocol):
    """What a step cache must know of a denoiser.

    Attributes:
        class_name: the diffusers transformer class, `QwenImageTransformer2DModel`.
        pipeline_class_names: the diffusers pipelines that it is the denoiser of: the spec's `model_type`s.
        polynomial: default TeaCache coefficients.
        polynomials: those of pipelines that have their own, by class name.
        signal_ignores_text: True where block 0's modulated input is the same for all CFG branches.
        no_reference_cache: why there is no reference KV cache for it, as a sentence; empty where there is.
    """

    class_name: str
    pipeline_class_names: tuple[str, ...]
    polynomial: Polynomial
    polynomials: Mapping[str, Polynomial]
    signal_ignores_text: bool
    no_reference_cache: str

    def extract_context(self, module: nn.Module, **forward_kwargs: Any) -> CacheContext:
        """Preprocess one forward pass and say what to compare, how to run the blocks and how to finish.

        What only the blocks need (text projection, RoPE, masks) is left to `run_transformer_blocks`, so that a
        skipped step does not pay for it.
        """
        ...

    def token_layout(self, module: nn.Module, forward_kwargs: Mapping[str, Any]) -> TokenLayout:
        """Noise and reference tokens of this forward pass, the same at all steps of a run.

        Reads the device at most once a run.
        """
        ...

    def run_arguments(self, forward_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """What runs are told apart by, under the names of most models.

        `hidden_states` `(B, ...)`, `timestep` that falls from 1 to 0, and `encoder_hidden_states`.
        """
        ...

    def begin_run(self, forward_kwargs: Mapping[str, Any]) -> None:
        """A run begins with this forward pass: what was remembered of earlier ones counts no more."""
        ...

    def must_run(self, forward_kwargs: Mapping[str, Any]) -> bool:
        """Whether later steps depend on this one having run, such as one that fills a cache of the model's own."""
        ...

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        """Every transformer block in the order of execution; the first takes the stack's input first."""
        ...

    def final_norm(self, module: nn.Module) -> nn.Module:
        """The module whose first positional input is the output of the block stack."""
        ...

    def noise_tokens(
        self, stream: torch.Tensor, layout: TokenLayout, forward_kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """The noise's part of the image stream before or behind the blocks, or of the model's output."""
        ...

    def noisy_latents(self, forward_kwargs: Mapping[str, Any], layout: TokenLayout) -> torch.Tensor:
        """The latents x that the solver moves by the model's output, shaped as the noise's part of that.

        With the output's sign: x + (1 - sigma) output is the noise, or the noise negated. Where more is joined to x
        in each token, what comes in as a whole.
        """
        ...

    def noise_only(self, forward_kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """The same forward pass without reference tokens; positions stay those of the full sequence.

        Unchanged where `extract_context` passes references by of itself.
        """
        ...

    def rows(self, forward_kwargs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any] | None:
        """The same forward pass for some samples of the batch, in this order; None where it cannot be divided."""
        ...


class TransformerAdapter(StepAdapter, Protocol):
    """What both sampling caches must know of a denoiser: that of a model family.

    Attributes:
        attention_processor_class_names: the processors whose arithmetic `joint_qkv` and `project_attention` follow.
        attention_kwargs_name: the forward's argument that its blocks pass on to the attention processors.
    """

    attention_processor_class_names: tuple[str, ...]
    attention_kwargs_name: str

    def noise_only_block(self, block_kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """Keyword arguments of one block with what the forward made beside the tokens cut to the noise."""
        ...

    def reference_only_block(self, block_kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """The same, cut to the references, with no text; `hidden_states` and `temb` are left as they are."""
        ...

    def image_embedder(self, module: nn.Module) -> nn.Module:
        """The module that takes image tokens `(B, tokens, C)` to `(B, tokens, D)`."""
        ...

    def timestep_embedder(self, module: nn.Module) -> nn.Module:
        """The module that makes `temb`."""
        ...

    def reference_conditioning(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """From the timestep embedder's arguments those for isolated references: t = 0, and no word of the prompt."""
        ...

    def attention_modules(self, module: nn.Module) -> Sequence[nn.Module]:
        """The attention module of every block, in order: what the reference KV cache gives a processor to."""
        ...

    def joint_qkv(
        self,
        attention: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        image_rotary_emb: Any,
        behind: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> JointQKV:
        """Project, normalise and rotate as the stock processor does, bit for bit.

        `behind`: keys and values `(B, R, H, d)` that are put behind those of the tokens.
        """
        ...

    def reference_kv(
        self, attention: nn.Module, modulated: torch.Tensor, frequencies: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K after norm and RoPE, and V, `(B, R, H, d)`, of references: those that `joint_qkv` gives last.

        From what the attention module is given for them, `(B, R, D)`, and what `reference_frequencies` gives.
        """
        ...

    def reference_frequencies(self, image_rotary_emb: Any, references: int) -> tuple[torch.Tensor, ...]:
        """The RoPE frequencies of the last tokens, of those that the attention module is given."""
        ...

    def reference_facts(self, forward_kwargs: Mapping[str, Any], layout: TokenLayout) -> Sequence[object]:
        """What isolated references' K and V depend on beside tokens, weights and attention arguments, to compare."""
        ...

    def reference_lengths(self, forward_kwargs: Mapping[str, Any], layout: TokenLayout) -> tuple[int, ...]:
        """Tokens of each reference picture, in order."""
        ...

    def project_attention(self, attention: nn.Module, attended: torch.Tensor, prefix: int) -> Any:
        """What the stock processor returns for attended tokens `(B, tokens, H * d)`."""
        ...

    def reference_is_exact(self, module: nn.Module) -> bool:
        """True where references neither see the noise nor are modulated by t, so that cached K and V are exact."""
        ...
