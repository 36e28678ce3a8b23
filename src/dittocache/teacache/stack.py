"""How to run a model around its block stack: the stock forward watched, an extractor's own functions, or as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from dittocache.errors import StepCacheError
from dittocache.families.transformer_side import CacheContext, StepAdapter, TokenLayout
from dittocache.teacache.offloading import brought_in
from dittocache.teacache.outputs import sample_of, with_sample
from dittocache.teacache.prediction import StackPass
from dittocache.teacache.ranks import context_parallel, gathered

Extractor = Callable[..., CacheContext]


class BlockStack(Protocol):
    """What the hook asks of a model; `signal_is_shared` where all CFG branches have the same signal."""

    signal_is_shared: bool

    def attach(self, module: nn.Module) -> None:
        """Make ready to run `module`."""
        ...

    def detach(self) -> None:
        """Undo `attach`."""
        ...

    def extract(self, module: nn.Module, forward_kwargs: Mapping[str, Any], layout: TokenLayout | None) -> CacheContext:
        """The context of this step without running the blocks."""
        ...

    def samples(self, forward_kwargs: Mapping[str, Any]) -> int:
        """Samples in the batch."""
        ...

    def rows(self, forward_kwargs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any] | None:
        """The same forward pass for some samples of the batch; None where the model's arguments cannot be divided."""
        ...

    def must_run(self, forward_kwargs: Mapping[str, Any]) -> bool:
        """Whether later steps depend on this one having run."""
        ...

    def latents(self, forward_kwargs: Mapping[str, Any], layout: TokenLayout | None) -> torch.Tensor | None:
        """The noisy latents that the model's output moves, as the solver has them; None where nobody knows."""
        ...

    def compute(
        self,
        module: nn.Module,
        forward_kwargs: Mapping[str, Any],
        layout: TokenLayout | None,
        context: Callable[[], CacheContext],
        forward: Callable[..., Any],
    ) -> tuple[Any, StackPass | None]:
        """What the model returns for a computed step, and what went in and out of its blocks.

        The latter is None where only the output can be predicted. `context` gives that of the whole batch, extracted
        once a step.
        """
        ...


class StockStack:
    """The model's own forward, so that a computed step is the stock one bit for bit; noise tokens only are kept."""

    def __init__(self, adapter: StepAdapter) -> None:
        self._adapter = adapter
        self.signal_is_shared = adapter.signal_ignores_text
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    def attach(self, module: nn.Module) -> None:
        """Watch the first block's input and the final norm's input."""

        def take_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._input = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        def take_output(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._output = args[0]

        first, norm = self._adapter.blocks(module)[0], self._adapter.final_norm(module)
        self._handles = [
            first.register_forward_pre_hook(take_input, with_kwargs=True),
            norm.register_forward_pre_hook(take_output),
        ]

    def detach(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._input = self._output = None

    def extract(self, module: nn.Module, forward_kwargs: Mapping[str, Any], layout: TokenLayout | None) -> CacheContext:
        """Embedding and modulation of the noise tokens; text and references cost nothing here."""
        noise = dict(forward_kwargs) if layout is None else self._adapter.noise_only(forward_kwargs, layout)
        # Beneath a skipped step neither the model nor a block is called, which would bring in weights and split tokens.
        called = (module, self._adapter.blocks(module)[0])
        with brought_in(called):
            found = self._adapter.extract_context(module, **noise)

        def postprocess(hidden_states: torch.Tensor) -> Any:
            with brought_in(called):
                output = found.postprocess(hidden_states)
            if context_parallel(module) is None:
                return output
            # Every rank has all noise tokens here; diffusers gathers them from all ranks all the same.
            return with_sample(output, sample_of(output)[:, : hidden_states.shape[1]])

        return replace(found, postprocess=postprocess)

    def samples(self, forward_kwargs: Mapping[str, Any]) -> int:
        """Rows of `hidden_states`."""
        return len(self._adapter.run_arguments(forward_kwargs)["hidden_states"])

    def rows(self, forward_kwargs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any] | None:
        """As the family divides its arguments."""
        return self._adapter.rows(forward_kwargs, rows)

    def must_run(self, forward_kwargs: Mapping[str, Any]) -> bool:
        """Where the model fills a cache of its own."""
        return self._adapter.must_run(forward_kwargs)

    def latents(self, forward_kwargs: Mapping[str, Any], layout: TokenLayout | None) -> torch.Tensor | None:
        """The noise tokens as they come in."""
        return None if layout is None else self._adapter.noisy_latents(forward_kwargs, layout)

    def compute(
        self,
        module: nn.Module,
        forward_kwargs: Mapping[str, Any],
        layout: TokenLayout | None,
        context: Callable[[], CacheContext],
        forward: Callable[..., Any],
    ) -> tuple[Any, StackPass]:
        """Run `forward` (the stock one, or an inner hook's) and see what passes the blocks."""
        try:
            output = forward(**forward_kwargs)
            if self._input is None or self._output is None:
                raise StepCacheError(
                    f"the forward of {type(module).__name__} passed its first block or final norm by; "
                    "TeaCache cannot tell what the blocks did. Turn off other caches on this transformer"
                )
            if layout is None:
                return output, StackPass(self._input, self._output)
            tokens = layout.noise + layout.reference

            def noise_of(stream: torch.Tensor) -> torch.Tensor:
                whole = gathered(module, stream, tokens)
                return self._adapter.noise_tokens(whole, layout, forward_kwargs)

            return output, StackPass(self._input, self._output, noise_of)
        finally:
            self._input = self._output = None  # they would keep a step's activations alive


class _Undescribed:
    """A model whose forward's arguments nobody has described: they stay whole, and nothing is watched."""

    def attach(self, module: nn.Module) -> None:
        """Nothing to watch."""

    def detach(self) -> None:
        """Nothing was watched."""

    def samples(self, forward_kwargs: Mapping[str, Any]) -> int:
        """Rows of the first argument that is a picture for each sample."""
        return first_length(forward_kwargs)

    def rows(self, forward_kwargs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any] | None:
        """Nobody knows which of its arguments have a row for each sample."""
        return None

    def must_run(self, forward_kwargs: Mapping[str, Any]) -> bool:
        """Nobody said so."""
        return False

    def latents(self, forward_kwargs: Mapping[str, Any], layout: TokenLayout | None) -> torch.Tensor | None:
        """Nobody knows which argument they are."""
        return None


class WholeForward(_Undescribed):
    """A transformer that nobody has taken apart: enough to predict its output, without a signal or a residual."""

    signal_is_shared = True

    def extract(self, module: nn.Module, forward_kwargs: Mapping[str, Any], layout: TokenLayout | None) -> CacheContext:
        """There is no extractor: StepCacheError."""
        raise StepCacheError(
            f"nobody knows the blocks of {type(module).__name__}: add an extractor with register_extractor, or predict "
            "the output with the error gate"
        )

    def compute(
        self,
        module: nn.Module,
        forward_kwargs: Mapping[str, Any],
        layout: TokenLayout | None,
        context: Callable[[], CacheContext],
        forward: Callable[..., Any],
    ) -> tuple[Any, StackPass | None]:
        """The forward and nothing besides."""
        return forward(**forward_kwargs), None


class ExtractorStack(_Undescribed):
    """A user's extractor, run by its own functions; its signal may differ between CFG branches."""

    signal_is_shared = False

    def __init__(self, extractor: Extractor) -> None:
        self._extractor = extractor

    def extract(self, module: nn.Module, forward_kwargs: Mapping[str, Any], layout: TokenLayout | None) -> CacheContext:
        """The extractor's context, validated."""
        context = self._extractor(module, **forward_kwargs)
        context.validate()
        return context

    def compute(
        self,
        module: nn.Module,
        forward_kwargs: Mapping[str, Any],
        layout: TokenLayout | None,
        context: Callable[[], CacheContext],
        forward: Callable[..., Any],
    ) -> tuple[Any, StackPass]:
        """Blocks and postprocessing of the context; its first output is the image stream."""
        found = context()
        hidden_states = found.run_transformer_blocks()[0]
        return found.postprocess(hidden_states), StackPass(found.hidden_states, hidden_states)


def first_length(forward_kwargs: Mapping[str, Any]) -> int:
    """Length of the first argument that is a tensor of two or more dimensions, or a list of tensors; 1 without any."""
    for value in forward_kwargs.values():
        if isinstance(value, torch.Tensor) and value.ndim > 1:
            return len(value)
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return len(value)
    return 1
