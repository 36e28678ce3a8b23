"""Settings of the reference cache: what may be said, also in files and on the command line, and what may not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from tests.denoising import EDITS, equal, qwen_transformer, velocities

from dittocache.config import check_config, parse_overrides
from dittocache.errors import ConfigError, ReferenceCacheError
from dittocache.families.denoiser import is_isolated
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.hook import apply_reference_kv
from dittocache.referencekv.isolation import isolate_references
from dittocache.sampling.session import cached

RUN = {"model": {"path": "bundled"}, "data": {"path": "pictures"}}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--reference-kv.refresh", "4"], ReferenceKVConfig(refresh=4)),
        (["--reference-kv.refresh", "[0, 5, 2]"], ReferenceKVConfig(refresh=(0, 2, 5))),
        (["--reference-kv.refresh=adaptive", "--reference-kv.drift-tolerance=0.1"], None),
        (["--reference-kv.mode", "exact", "--reference-kv.reuse-across-calls", "true"], None),
        (["--reference-kv.refresh", "null", "--reference-kv.freeze-from-layer", "3"], None),
    ],
)
def test_the_command_line_says_all_of_it(words: list[str], expected: ReferenceKVConfig | None) -> None:
    config = check_config(RUN, parse_overrides(words)).reference_kv
    assert config is not None and (expected is None or config == expected)
    again = check_config({**RUN, "reference_kv": config.model_dump(mode="json")})  # a saved run, read back
    assert again.reference_kv == config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"refresh": 0}, "greater than or equal to 1"),
        ({"refresh": True}, "found True"),
        ({"refresh": "sometimes"}, "adaptive"),
        ({"refresh": (1, 2)}, "step 0 among them, found \\[1, 2\\]"),
        ({"refresh": (0, 2, 2)}, "once each"),
        ({"mode": "exact", "refresh": 2}, "refresh says nothing"),
        ({"mode": "exact", "extrapolate": True}, "extrapolate says nothing"),
        ({"mode": "exact", "freeze_from_layer": 2}, "freeze_from_layer says nothing"),
        ({"drift_tolerance": 0.3}, "refresh 'adaptive' only, found refresh None"),
        ({"extrapolate": True, "refresh": (0,)}, "refresh \\[0\\] leaves none"),
        ({"extrapolate": True, "refresh": 1}, "refresh 1 leaves none"),
        ({"mode": "approx", "reuse_across_calls": True}, "exact references"),
        ({"refresh": 1, "storage": "fp8"}, "keeps nothing"),
        ({"refresh": 1, "max_gb": 2}, "keeps nothing"),
        ({"max_gb": 0}, "greater than 0"),
        ({"storage": "int4"}, "'native', 'fp8' or 'modulated_input'"),
        ({"freeze_from_layer": 0}, "greater than or equal to 1"),
        ({"referesh": 2}, "Extra inputs"),
    ],
)
def test_what_contradicts_itself_is_an_error(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ReferenceKVConfig(**settings)
    with pytest.raises(ConfigError, match="reference_kv"):
        check_config({**RUN, "reference_kv": settings})


def test_the_specifications_name_turns_it_on_in_a_file() -> None:
    assert check_config({**RUN, "generate": {"use_image_kv_cache": True}}).reference_kv == ReferenceKVConfig()
    assert check_config({**RUN, "generate": {"use_image_kv_cache": False}}).reference_kv is None
    both = {**RUN, "generate": {"use_image_kv_cache": True}, "reference_kv": {"refresh": 3}}
    assert check_config(both).reference_kv == ReferenceKVConfig(refresh=3)
    with pytest.raises(ConfigError, match="use_image_kv_cache is False, but reference_kv"):
        check_config({**both, "generate": {"use_image_kv_cache": False}})


def test_exact_is_refused_where_it_would_not_be_and_says_why() -> None:
    model = qwen_transformer(zero_cond_t=True)
    with pytest.raises(ReferenceCacheError, match="not isolated: they see the noise.*or take mode 'approx'"):
        apply_reference_kv(model, ReferenceKVConfig(mode="exact"))
    with pytest.raises(ReferenceCacheError, match="reuse_across_calls is for references that never change"):
        apply_reference_kv(model, ReferenceKVConfig(reuse_across_calls=True))
    with pytest.raises(ReferenceCacheError, match="freeze_from_layer is 3, but .* has the layers 0 to 2"):
        apply_reference_kv(model, ReferenceKVConfig(freeze_from_layer=3))
    with (
        isolate_references(model),
        pytest.raises(ReferenceCacheError, match="isolated and never change, so no layer need"),
    ):
        apply_reference_kv(model, ReferenceKVConfig(freeze_from_layer=1))


@pytest.mark.parametrize(
    ("known_by", "value"),
    [
        ("reference_visibility", "isolated"),
        ("reference_visibility", "apart"),
        ("_name_or_path", "/models/models--lightx2v--Qwen-Image-Edit-Causal/snapshots/0a1b/transformer"),
        ("_name_or_path", "lightx2v/Qwen-Image-Edit-Causal"),
    ],
)
def test_a_checkpoint_that_is_known_to_be_trained_so_is_exact_without_a_word(known_by: str, value: str) -> None:
    edit, model = EDITS["two references"], qwen_transformer(zero_cond_t=True)
    apart = value != "isolated"
    with isolate_references(model, apart=apart):
        expected = velocities(model, edit, 3)
    model.register_to_config(**{known_by: value})
    with cached(model, reference_kv=ReferenceKVConfig()) as trace:
        assert is_isolated(model)
        assert equal(velocities(model, edit, 3), expected)
    assert trace.references_reused >= 2
    assert any("this checkpoint was trained so" in note for note in trace.notes)
    assert not is_isolated(model)
    with cached(model, reference_kv=ReferenceKVConfig(mode="approx")):
        assert not is_isolated(model)  # asked for otherwise


def test_other_names_are_not_known() -> None:
    model = qwen_transformer()
    model.register_to_config(_name_or_path="someone/Qwen-Image-Edit-Causal-like", reference_visibility="full")
    with pytest.raises(ReferenceCacheError, match="Neither the checkpoint's name nor its configuration"):
        apply_reference_kv(model, ReferenceKVConfig(mode="exact"))
    assert not is_isolated(model)
