"""Where a pipeline lies: the decision from numbers, and what diffusers is told."""

from __future__ import annotations

from typing import Any

import pytest

from dittocache.sampling.placement import WORKING_BYTES, choose_offload, place

GB = 10**9
EDIT = {"transformer": 41 * GB, "text_encoder": 17 * GB, "vae": GB // 4}


@pytest.mark.parametrize(
    ("card", "expected"), [(140, "none"), (80, "none"), (66, "components"), (50, "components"), (48, "layers")]
)
def test_the_fastest_placement_that_fits(card: int, expected: str) -> None:
    assert choose_offload(EDIT, card * GB) == expected


def test_nothing_but_activations_may_not_fit_either() -> None:
    assert choose_offload({}, WORKING_BYTES - 1) == "layers"


class Told:
    """A pipeline that notes what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def to(self, device: Any) -> None:
        self.calls.append(("to", {"device": device}))

    def enable_model_cpu_offload(self, **options: Any) -> None:
        self.calls.append(("components", options))

    def enable_group_offload(self, **options: Any) -> None:
        self.calls.append(("layers", options))


def test_each_placement_is_diffusers_own() -> None:
    pipe = Told()
    for offload in ("none", "components", "layers"):
        place(pipe, "cuda:1", offload)
    assert [name for name, _ in pipe.calls] == ["to", "components", "layers"]
    assert str(pipe.calls[1][1]["device"]) == str(pipe.calls[2][1]["onload_device"]) == "cuda:1"
    assert pipe.calls[2][1]["use_stream"]
    place(pipe, "cpu", "layers")
    assert pipe.calls[-1][0] == "to"
