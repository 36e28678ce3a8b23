"""References are the same when they hold the same; what was wrong a step ago on a GPU comes out at the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dittocache.errors import ReferenceCacheError
from dittocache.referencekv.watch import ReferenceWatch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_content_counts_and_not_the_address(dtype: torch.dtype) -> None:
    references, watch = torch.randn(1, 6, 4).to(dtype), ReferenceWatch()
    assert not watch.holds(references, at_once=True)
    watch.keep(references)
    assert watch.holds(references.clone(), at_once=False)
    references[0, 3, 2] += 1  # the same memory, another picture
    assert not watch.holds(references, at_once=False)
    assert not watch.holds(references[:, :5], at_once=False)
    assert not watch.holds(references.double(), at_once=False)


def test_a_part_of_a_longer_sequence_and_numbers_that_are_none_are_compared_too() -> None:
    tokens, watch = torch.randn(1, 10, 4), ReferenceWatch()
    tokens[0, 7, 1] = float("nan")
    watch.keep(tokens[:, 4:])
    tokens[:, :4] += 1  # the noise
    assert watch.holds(tokens[:, 4:], at_once=False)


class _Event:
    waited = 0

    def synchronize(self) -> None:
        _Event.waited += 1


@pytest.mark.parametrize("same", [True, False])
def test_the_answer_of_the_step_before_is_read_once(same: bool) -> None:
    watch, before = ReferenceWatch(), _Event.waited
    event: Any = _Event()
    watch._asked = torch.tensor(same), event
    if same:
        watch.settle()
    else:
        with pytest.raises(ReferenceCacheError, match="changed in the middle of a denoising run"):
            watch.settle()
    watch.settle()
    assert _Event.waited == before + 1
