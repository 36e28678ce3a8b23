"""Attention backends of diffusers: those that run here give the stock result, the others the stock error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from tests.denoising import EDITS, Edit, equal, flux_transformer, qwen_transformer, relative_error, velocities
from tests.referencekv.cached_steps import FROZEN, reference_kv, twice
from tests.referencekv.test_kontext import kontext_kwargs

from dittocache.referencekv.isolation import isolate_references

pytestmark = [
    pytest.mark.usefixtures("own_backend"),
    # flex says that it is slow unless it is compiled.
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
]

NAMES = [backend.value for backend in AttentionBackendName]
HERE = ["native", "_native_math", "_native_flash", "flex"]

every_backend_here = pytest.mark.parametrize("backend", HERE)
masked_or_not = pytest.mark.parametrize("edit", [EDITS["plain"], EDITS["text mask"]], ids=["plain", "text mask"])


@pytest.fixture
def own_backend() -> Iterator[None]:
    """A model that is given an attention backend makes it the active one of the whole process."""
    with attention_backend(AttentionBackendName.NATIVE):
        yield


def outcome(compute: Any) -> Any:
    """What comes out, or the words of the error."""
    try:
        with torch.no_grad():
            return compute()
    except (RuntimeError, ValueError, TypeError, NameError, ImportError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


@every_backend_here
@masked_or_not
def test_a_full_and_a_cached_step_are_those_of_the_stock_model(backend: str, edit: Edit) -> None:
    kwargs = edit.kwargs(edit.latents(), 0.75)
    model = qwen_transformer()
    with attention_backend(backend):
        stock = outcome(lambda: model(**kwargs)[0])
        with reference_kv(model, FROZEN) as hook:
            found = outcome(lambda: twice(model, kwargs))
            if isinstance(stock, str):  # no mask in this backend: no silent change to one that has it
                assert found == stock
                assert hook.bytes_held == 0
                return
    full, cached = found
    assert torch.equal(full, stock)
    assert relative_error(cached, stock[:, : edit.noise]) < 1e-5


@every_backend_here
def test_kontext_too(backend: str) -> None:
    model, kwargs = flux_transformer(), kontext_kwargs(0.5)
    with attention_backend(backend), torch.no_grad():
        stock = model(**kwargs)[0]
        with reference_kv(model, FROZEN):
            full, cached = model(**kwargs)[0], model(**kwargs | {"timestep": kwargs["timestep"] - 1e-6})[0]
    assert torch.equal(full, stock)
    assert relative_error(cached, stock[:, : cached.shape[1]]) < 1e-3


@every_backend_here
def test_exact_references_stay_exact(backend: str) -> None:
    model, edit = qwen_transformer(), EDITS["plain"]
    isolate_references(model)
    with attention_backend(backend):
        uncached = velocities(model, edit, 3)
        with reference_kv(model):
            assert equal(velocities(model, edit, 3), uncached)


def test_a_backend_that_is_not_here_fails_as_without_the_cache() -> None:
    model, edit = qwen_transformer(), EDITS["plain"]
    kwargs = edit.kwargs(edit.latents(), 0.75)
    missing = 0
    for name in sorted(set(NAMES) - set(HERE)):
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName(name))  # past the check of what is installed
        stock = outcome(lambda: model(**kwargs))
        with reference_kv(model) as hook:
            assert outcome(lambda: model(**kwargs)) == stock
            assert (hook.bytes_held == 0) == isinstance(stock, str)
        missing += isinstance(stock, str)
    assert missing > 10


def test_a_backend_that_cannot_be_set_is_not_set() -> None:
    model = qwen_transformer()
    with reference_kv(model):
        with pytest.raises(RuntimeError, match="not usable"):
            model.set_attention_backend("_native_npu")
        assert all(block.attn.processor._attention_backend is None for block in model.transformer_blocks)


@pytest.mark.parametrize("isolated", [False, True])
def test_a_backend_that_is_set_in_the_session_stays_as_diffusers_leaves_it(isolated: bool) -> None:
    # set_attention_backend is for the model's processors, and for every other model of the process that has none set.
    model, other = qwen_transformer(), qwen_transformer()
    if isolated:
        isolate_references(model)
    with reference_kv(model):
        model.set_attention_backend("_native_math")
    assert all(block.attn.processor._attention_backend == "_native_math" for block in model.transformer_blocks)
    assert _AttentionBackendRegistry.get_active_backend()[0] == "_native_math"
    assert all(block.attn.processor._attention_backend is None for block in other.transformer_blocks)
    with reference_kv(model):
        model.reset_attention_backend()
    assert all(block.attn.processor._attention_backend is None for block in model.transformer_blocks)
