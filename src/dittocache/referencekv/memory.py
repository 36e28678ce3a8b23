"""How much memory references take, and in which form they fit a budget: decisions from numbers alone.

A *set* is what is kept of the references for one CFG branch; two where a line is laid through two refreshes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dittocache.errors import ModelError, ReferenceCacheError
from dittocache.families.denoiser import find_denoiser
from dittocache.families.registry import adapter_of
from dittocache.families.transformer_side import TransformerAdapter
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.storage import FP8, MODULATED_INPUT, NATIVE, StorageForm

GB = 10**9
_BLOCKS_AT_A_TIME = 2  # on the device, of those on the host: the one that is computed and the next
_FORMS: dict[str, StorageForm] = {form.name: form for form in (NATIVE, FP8, MODULATED_INPUT)}


@dataclass(frozen=True)
class ReferenceSize:
    """References of one run, and the transformer that they are kept for.

    Attributes:
        tokens: R, of all references of a sample.
        batch: samples.
        layers: blocks that keep them.
        heads, head_width: of the attention.
        width: of the blocks' input.
        element_size: bytes of an element of K and V.
    """

    tokens: int
    batch: int
    layers: int
    heads: int
    head_width: int
    width: int
    element_size: int

    def bytes_per_layer(self, form: StorageForm) -> int:
        """Of one set."""
        return (
            self.batch * self.tokens * form.bytes_per_token(self.heads, self.head_width, self.width, self.element_size)
        )


@dataclass(frozen=True)
class Placement:
    """A form, and where it lies."""

    form: StorageForm
    offload: bool

    @property
    def words(self) -> str:
        """For a person."""
        return f"{self.form.name}, offloaded" if self.offload else self.form.name

    def device_bytes(self, sizes: Sequence[ReferenceSize]) -> int:
        """On the device at most, of sets of these sizes."""
        return sum(
            (min(size.layers, _BLOCKS_AT_A_TIME) if self.offload else size.layers) * size.bytes_per_layer(self.form)
            for size in sizes
        )

    def host_bytes(self, sizes: Sequence[ReferenceSize]) -> int:
        """On the host."""
        return sum(size.layers * size.bytes_per_layer(self.form) for size in sizes) if self.offload else 0


def placements(config: ReferenceKVConfig, exact: bool, on_host: bool) -> list[Placement]:
    """What `config` allows, the fastest first.

    8 bits cost next to nothing, but change the outcome: they are not chosen where references are exact. Offloading is
    hidden behind the computation wherever a block computes for longer than its references are under way. Projecting
    them anew is never hidden.

    Args:
        exact: whether references are exact, and are to stay so.
        on_host: whether the host's memory is another one than the device's.
    """
    if config.storage != "auto":
        forms: Sequence[StorageForm] = [_FORMS[config.storage]]
    else:
        forms = [NATIVE, MODULATED_INPUT] if exact else [NATIVE, FP8]
    found = [Placement(form, offload) for offload in (False, True) for form in forms]
    if exact and on_host:
        found.sort(key=lambda placement: placement.form is MODULATED_INPUT)
    if config.offload:
        return [placement for placement in found if placement.offload]
    return found if on_host and config.max_gb is not None else [one for one in found if not one.offload]


def choose(
    config: ReferenceKVConfig,
    sizes: Sequence[ReferenceSize],
    *,
    exact: bool,
    on_host: bool,
    current: Placement | None = None,
) -> Placement:
    """The first placement that fits `max_gb`.

    Args:
        sizes: of the sets that will be kept at a time.
        current: what some sets are kept in already; they can be turned into another form only where K and V are there.

    Raises ReferenceCacheError where none fits.
    """
    allowed = [one for one in placements(config, exact, on_host) if current is None or _can_become(current, one)]
    if config.max_gb is None:
        return allowed[0]
    for placement in allowed:
        if placement.device_bytes(sizes) <= config.max_gb * GB:
            return placement
    tried = ", ".join(f"{one.words} {gb(one.device_bytes(sizes))}" for one in allowed)
    tokens = sum(size.tokens * size.batch for size in sizes)
    raise ReferenceCacheError(
        f"keys and values of {tokens} reference tokens (all samples and CFG branches) in {sizes[0].layers} layers do "
        f"not fit max_gb {config.max_gb:g}: {tried}; raise max_gb, use fewer or smaller references, or leave storage "
        "to be chosen (auto)"
    )


def _can_become(current: Placement, other: Placement) -> bool:
    return other.form is current.form or (other.form.from_key_value and current.form.from_key_value)


def gb(count: int) -> str:
    """Bytes in words."""
    return f"{count / GB:.2f} GB" if count >= GB / 10 else f"{count / 10**6:.1f} MB"


def reference_size(
    module: Any, adapter: TransformerAdapter, tokens: int, batch: int, element_size: int
) -> ReferenceSize:
    """References of a run on this transformer."""
    attention: list[Any] = list(adapter.attention_modules(module))
    first = attention[0]
    return ReferenceSize(
        tokens=tokens,
        batch=batch,
        layers=len(attention),
        heads=first.heads,
        head_width=first.inner_dim // first.heads,
        width=first.query_dim,
        element_size=element_size,
    )


def predicted_bytes(
    target: Any,
    tokens: int,
    *,
    batch: int = 1,
    branches: int = 1,
    generations: int = 1,
    storage: str = "native",
) -> int:
    """Bytes that keeping references will take, before anything has run: layers x R x bytes a token x sets.

    `native` is 2 x layers x R x width x bytes of an element for each reference, sample, CFG branch and generation.

    Args:
        target: a diffusers pipeline with a transformer, or the transformer.
        tokens: R, of all references of a sample: 4096 for one of 1024 x 1024 pixels.
        branches: 2 with classifier-free guidance; 1 where references are exact, since branches share them.
        generations: 2 where a line is laid through two refreshes.

    Raises ReferenceCacheError for an unknown form or model, ModelError where there is no transformer.
    """
    if storage not in _FORMS:
        raise ReferenceCacheError(f"no storage {storage!r} for references; there are {', '.join(_FORMS)}")
    module: Any = find_denoiser(target).module
    try:
        adapter = adapter_of(module)
    except ModelError as error:
        raise ReferenceCacheError(f"the memory of references cannot be predicted: {error}") from error
    size = reference_size(module, adapter, tokens, batch, module.dtype.itemsize)
    return Placement(_FORMS[storage], False).device_bytes([size] * branches * generations)
