"""The registry of extractors: how a model's forward pass is taken apart, by pipeline or transformer class name.

Every model of `families/` is in it. A user's extractor, registered under a name, takes precedence over the family's.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence

from dittocache.errors import StepCacheError
from dittocache.families.polynomials import PLAIN
from dittocache.families.transformer_side import CacheContext, Polynomial, StepAdapter
from dittocache.teacache.stack import Extractor

__all__ = ["EXTRACTOR_REGISTRY", "CacheContext", "get_extractor", "register_extractor"]


class _Registry(MutableMapping[str, Extractor]):
    """A dictionary that holds the families' extractors from the first look on, so that importing it stays cheap."""

    def __init__(self) -> None:
        self._own: dict[str, Extractor] = {}
        self._families: dict[str, Extractor] | None = None

    def _all(self) -> dict[str, Extractor]:
        if self._families is None:
            self._families = {}
            for adapter in _adapters():
                for name in (*adapter.pipeline_class_names, adapter.class_name):
                    self._families[name] = adapter.extract_context
        return {**self._families, **self._own}

    def __getitem__(self, model_type: str) -> Extractor:
        return self._all()[model_type]

    def __setitem__(self, model_type: str, extractor: Extractor) -> None:
        if not callable(extractor):
            raise StepCacheError(f"the extractor of {model_type!r} must be callable, found {type(extractor).__name__}")
        self._own[model_type] = extractor

    def __delitem__(self, model_type: str) -> None:
        """Forget a user's extractor; the family's, where there is one, counts again."""
        del self._own[model_type]
        _polynomials.pop(model_type, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def registered_by_user(self, model_type: str) -> bool:
        """Whether the extractor of this name is a user's rather than a family's."""
        return model_type in self._own


EXTRACTOR_REGISTRY = _Registry()
_polynomials: dict[str, Polynomial] = {}


def register_extractor(model_type: str, extractor: Extractor, polynomial: Polynomial | None = None) -> None:
    """Use `extractor` for models of `model_type`, a pipeline or transformer class name.

    Args:
        model_type: `YourModelPipeline`.
        extractor: takes the transformer and its forward's arguments, returns a `CacheContext`.
        polynomial: coefficients that rescale the distance; without them distances are added up as they are.
    """
    EXTRACTOR_REGISTRY[model_type] = extractor
    if polynomial is None:
        _polynomials.pop(model_type, None)
    else:
        _polynomials[model_type] = polynomial


def get_extractor(model_type: str) -> Extractor:
    """The extractor of a pipeline or transformer class name; raises StepCacheError for an unknown one."""
    if model_type not in EXTRACTOR_REGISTRY:
        raise StepCacheError(
            f"Unknown model type: {model_type!r}. Available types: {', '.join(sorted(EXTRACTOR_REGISTRY))}. "
            "Add yours with register_extractor"
        )
    return EXTRACTOR_REGISTRY[model_type]


def polynomial_of(model_type: str | None) -> Polynomial:
    """The coefficients for a pipeline or transformer class name: the model's, what a user registered, or none."""
    if model_type is None:
        return PLAIN
    adapter = family_adapter(model_type)
    if adapter is None:
        return _polynomials.get(model_type, PLAIN)
    return adapter.polynomials.get(model_type, adapter.polynomial)


def family_adapter(model_type: str) -> StepAdapter | None:
    """What this package knows of the model of this name, None where a user's extractor answers to it."""
    if EXTRACTOR_REGISTRY.registered_by_user(model_type):
        return None
    for adapter in _adapters():
        if model_type in (*adapter.pipeline_class_names, adapter.class_name):
            return adapter
    return None


def _adapters() -> Sequence[StepAdapter]:
    from dittocache.families.registry import step_adapters

    return step_adapters()
