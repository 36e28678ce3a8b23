"""How much memory references take and how they fit a budget: predicted from numbers, and as it comes out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.denoising import EDIT, EDITS, equal, flux_transformer, qwen_transformer, relative_error, velocities
from tests.referencekv.cached_steps import reference_kv

from dittocache.errors import ReferenceCacheError
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.isolation import isolate_references
from dittocache.referencekv.memory import (
    GB,
    Placement,
    ReferenceSize,
    choose,
    gb,
    placements,
    predicted_bytes,
    reference_size,
)
from dittocache.referencekv.offload import DeviceBlocks, OffloadedBlocks, PlainLink
from dittocache.referencekv.storage import FP8, MODULATED_INPUT, NATIVE
from dittocache.referencekv.store import BranchKV, RunKV
from dittocache.sampling.session import cached

QWEN_IMAGE = ReferenceSize(tokens=4096, batch=1, layers=60, heads=24, head_width=128, width=3072, element_size=2)
PLAIN, OFFLOADED = Placement(NATIVE, False), Placement(NATIVE, True)
EIGHT_BITS, INPUT = Placement(FP8, False), Placement(MODULATED_INPUT, False)
STEPS = 4
GUIDED = replace(EDIT, branches=("cond", "uncond"))
FROZEN = ReferenceKVConfig(refresh=(0,))


def test_one_reference_of_qwen_image_takes_2_81_gib() -> None:
    assert PLAIN.device_bytes([QWEN_IMAGE]) == 60 * 2 * 4096 * 3072 * 2
    assert PLAIN.device_bytes([QWEN_IMAGE]) / 2**30 == pytest.approx(2.8125)
    assert EIGHT_BITS.device_bytes([QWEN_IMAGE]) / PLAIN.device_bytes([QWEN_IMAGE]) == pytest.approx(0.508, abs=1e-3)
    assert INPUT.device_bytes([QWEN_IMAGE]) * 2 == PLAIN.device_bytes([QWEN_IMAGE])
    assert OFFLOADED.device_bytes([QWEN_IMAGE]) * 30 == PLAIN.device_bytes([QWEN_IMAGE])
    assert OFFLOADED.host_bytes([QWEN_IMAGE]) == PLAIN.device_bytes([QWEN_IMAGE])
    assert gb(PLAIN.device_bytes([QWEN_IMAGE])) == "3.02 GB"


@pytest.mark.parametrize(
    ("settings", "exact", "on_host", "expected"),
    [
        ({}, False, True, [PLAIN, EIGHT_BITS]),
        ({"max_gb": 1.0}, False, True, [PLAIN, EIGHT_BITS, OFFLOADED, Placement(FP8, True)]),
        ({"max_gb": 1.0}, False, False, [PLAIN, EIGHT_BITS]),
        ({"max_gb": 1.0}, True, True, [PLAIN, OFFLOADED, INPUT, Placement(MODULATED_INPUT, True)]),
        ({"max_gb": 1.0}, True, False, [PLAIN, INPUT]),
        ({"storage": "fp8"}, True, True, [EIGHT_BITS]),
        ({"storage": "modulated_input", "max_gb": 1.0}, False, True, [INPUT, Placement(MODULATED_INPUT, True)]),
        ({"offload": True}, False, True, [OFFLOADED, Placement(FP8, True)]),
    ],
)
def test_what_is_tried(settings: Any, exact: bool, on_host: bool, expected: list[Placement]) -> None:
    assert placements(ReferenceKVConfig(**settings), exact, on_host) == expected


@pytest.mark.parametrize(
    ("sets", "max_gb", "exact", "expected"),
    [
        (1, None, False, PLAIN),
        (1, 3.1, False, PLAIN),
        (2, 3.1, False, EIGHT_BITS),
        (2, 1.0, False, OFFLOADED),
        (2, 0.15, False, Placement(FP8, True)),
        (1, 3.0, True, OFFLOADED),
    ],
)
def test_the_first_that_fits_is_taken(sets: int, max_gb: float | None, exact: bool, expected: Placement) -> None:
    assert choose(ReferenceKVConfig(max_gb=max_gb), [QWEN_IMAGE] * sets, exact=exact, on_host=True) == expected


@given(st.floats(0.01, 20), st.integers(1, 6), st.booleans(), st.booleans())
def test_a_budget_is_kept_or_refused(max_gb: float, sets: int, exact: bool, on_host: bool) -> None:
    config = ReferenceKVConfig(max_gb=max_gb)
    try:
        placement = choose(config, [QWEN_IMAGE] * sets, exact=exact, on_host=on_host)
    except ReferenceCacheError as error:
        assert f"max_gb {max_gb:g}" in str(error)
        assert all(one.device_bytes([QWEN_IMAGE] * sets) > max_gb * GB for one in placements(config, exact, on_host))
    else:
        assert placement.device_bytes([QWEN_IMAGE] * sets) <= max_gb * GB
        assert not (exact and placement.form.lossy)


def test_what_nothing_fits_is_an_error_that_says_how_much_it_takes() -> None:
    with pytest.raises(
        ReferenceCacheError,
        match=r"4096 reference tokens .* in 60 layers do not fit max_gb 0.01: native 3\.02 GB, fp8 1\.53 GB, "
        r"native, offloaded 0\.10 GB, fp8, offloaded 51\.1 MB; raise max_gb",
    ):
        choose(ReferenceKVConfig(max_gb=0.01), [QWEN_IMAGE], exact=False, on_host=True)


def test_what_is_kept_as_input_cannot_become_keys_and_values() -> None:
    found = choose(ReferenceKVConfig(max_gb=4), [QWEN_IMAGE] * 2, exact=True, on_host=True, current=INPUT)
    assert found == INPUT
    with pytest.raises(ReferenceCacheError, match="max_gb 2: modulated_input"):
        choose(ReferenceKVConfig(max_gb=2), [QWEN_IMAGE] * 2, exact=True, on_host=False, current=INPUT)


@pytest.mark.parametrize("make", [qwen_transformer, flux_transformer], ids=["qwen", "flux"])
@pytest.mark.parametrize("storage", ["native", "fp8", "modulated_input"])
def test_the_prediction_for_a_model(make: Any, storage: str) -> None:
    model = make()
    layers = 3 if make is qwen_transformer else 4
    a_token = {"native": 2 * 32 * 4, "fp8": 2 * (32 + 2 * 4), "modulated_input": 32 * 4}[storage]
    found = predicted_bytes(model, 24, batch=2, branches=2, generations=2, storage=storage)
    assert found == layers * 24 * a_token * 2 * 2 * 2


def test_predictions_need_a_known_form_and_model() -> None:
    with pytest.raises(ReferenceCacheError, match="no storage 'int4' for references; there are native, fp8"):
        predicted_bytes(qwen_transformer(), 24, storage="int4")
    with pytest.raises(ReferenceCacheError, match="no family knows the transformer Linear"):
        predicted_bytes(torch.nn.Linear(1, 1), 24)


@pytest.mark.parametrize("storage", ["native", "fp8", "modulated_input"])
@pytest.mark.parametrize("offload", [False, True])
def test_what_was_predicted_is_held(storage: Any, offload: bool) -> None:
    config = FROZEN.model_copy(update={"storage": storage, "offload": offload})
    model = qwen_transformer()
    with reference_kv(model, config) as hook:
        velocities(model, GUIDED, STEPS)
        whole = predicted_bytes(model, EDIT.reference, branches=2, storage=storage)
        assert hook.bytes_held == hook._kept.predicted_bytes == (whole * 2 // 3 if offload else whole)
        assert hook._kept.host_bytes_held == (whole if offload else 0)
        hook.forget()
        assert hook.bytes_held == hook._kept.host_bytes_held == 0


@pytest.mark.parametrize("offload", [False, True])
def test_the_trace_says_what_was_expected_and_what_was_held(offload: bool) -> None:
    model = qwen_transformer()
    with cached(model, reference_kv=FROZEN.model_copy(update={"offload": offload})) as trace:
        velocities(model, GUIDED, STEPS)
    whole = predicted_bytes(model, EDIT.reference, branches=2)
    expected = whole * 2 // 3 if offload else whole
    assert (trace.bytes_held, trace.reference_bytes_predicted) == (expected, expected)
    assert trace.host_bytes_held == trace.as_dict()["host_bytes_held"] == (whole if offload else 0)
    said = f"the caches held at most {expected / 1e6:.1f} MB ({expected / 1e6:.1f} MB expected for references)"
    assert said in trace.summary()
    assert ("on the host" in trace.summary()) == offload


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("extrapolate", [False, True])
def test_offloading_changes_nothing(edit: Any, extrapolate: bool) -> None:
    config = ReferenceKVConfig(refresh=2, extrapolate=extrapolate)
    guided = replace(edit, branches=GUIDED.branches)
    found = []
    for offload in (False, True):
        model = qwen_transformer()
        with reference_kv(model, config.model_copy(update={"offload": offload})):
            found.append(velocities(model, guided, STEPS + 1))
    assert equal(*found)


def test_the_modulated_input_changes_nothing_but_rounding_and_8_bits_little() -> None:
    stock = velocities(qwen_transformer(), EDIT, STEPS)["cond"][-1]
    last = {}
    for storage in ("native", "modulated_input", "fp8"):
        model = qwen_transformer()
        with reference_kv(model, FROZEN.model_copy(update={"storage": storage})):
            last[storage] = velocities(model, EDIT, STEPS)["cond"][-1]
    assert relative_error(last["modulated_input"], last["native"]) < 1e-5
    assert 0 < relative_error(last["fp8"], last["native"]) < 0.02 < relative_error(last["native"], stock)


def test_weights_that_are_elsewhere_are_an_error_that_names_the_way_out() -> None:
    model = qwen_transformer()
    with reference_kv(model, FROZEN.model_copy(update={"storage": "modulated_input"})) as hook, torch.no_grad():
        model(**EDIT.kwargs(EDIT.latents(), 1.0))
        model.transformer_blocks[1].attn.to_k.to("meta")  # where sequential offloading leaves them
        with pytest.raises(ReferenceCacheError, match=r"on meta, its input on cpu: .* set storage to native"):
            model(**EDIT.kwargs(EDIT.latents(), 0.5))
        assert hook.bytes_held == 0


def test_a_second_branch_makes_the_first_one_move() -> None:
    one = predicted_bytes(qwen_transformer(), EDIT.reference)
    remarks: list[str] = []
    model = qwen_transformer()
    with reference_kv(model, FROZEN.model_copy(update={"max_gb": 1.5 * one / GB})) as hook:
        hook._kept._say = remarks.append
        held = []
        model.register_forward_hook(lambda *_: held.append(hook.bytes_held))
        velocities(model, GUIDED, STEPS)
        assert max(held) <= 1.5 * one
        assert [branch.placement for branch in hook._kept._sets] == [EIGHT_BITS] * 2
    assert len(remarks) == 2
    assert remarks[0].startswith("references are kept as native: ")
    assert remarks[1].startswith("references are kept as fp8: ")
    assert "as computed they would take" in remarks[1]


def test_an_exact_model_is_not_given_8_bits() -> None:
    model = qwen_transformer()
    isolate_references(model)
    uncached = velocities(model, GUIDED, STEPS)
    one = predicted_bytes(model, EDIT.reference)
    with reference_kv(model, ReferenceKVConfig(max_gb=0.6 * one / GB)) as hook:
        assert equal(velocities(model, GUIDED, STEPS), uncached)
        assert [branch.placement for branch in hook._kept._sets] == [INPUT]


def test_what_does_not_fit_leaves_nothing() -> None:
    model = qwen_transformer()
    with reference_kv(model, FROZEN.model_copy(update={"max_gb": 1e-6})) as hook:
        with pytest.raises(ReferenceCacheError, match="do not fit max_gb 1e-06"):
            velocities(model, GUIDED, STEPS)
        assert hook.bytes_held == 0


@pytest.mark.parametrize("settings", [{"storage": "fp8", "offload": True}, {"max_gb": 1e-4}], ids=str)
def test_nothing_grows_over_50_calls(settings: Any) -> None:
    model = qwen_transformer()
    with reference_kv(model, ReferenceKVConfig(refresh=2, **settings)) as hook:
        for call in range(50):
            velocities(model, replace(EDIT, seed=call % 3, batch=1 + call % 2), 1 + 3 * (call % 10 == 0))
            hook.reset_state(model)
            assert hook.bytes_held == hook.host_bytes_held == 0
            assert not hook._kept._sets


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_an_error_leaves_nothing_half_filled_on_either_side(error: Any, step: int) -> None:
    config = ReferenceKVConfig(refresh=2, offload=True)
    model, fresh = qwen_transformer(), qwen_transformer()
    with reference_kv(fresh, config):
        expected = velocities(fresh, GUIDED, STEPS)
    with reference_kv(model, config) as hook:
        velocities(model, GUIDED, STEPS, stop=step)

        def explode(*_: Any) -> None:
            raise error("injected")

        handle = model.transformer_blocks[1].register_forward_pre_hook(explode)
        with pytest.raises(error, match="injected"), model.cache_context("cond"), torch.no_grad():
            model(**GUIDED.kwargs(GUIDED.latents(), 1 - step / STEPS))
        handle.remove()
        assert hook.bytes_held == hook.host_bytes_held == 0
        assert equal(velocities(model, GUIDED, STEPS), expected)


def test_slices_are_not_kept_alive() -> None:
    whole = torch.zeros(1, 100, 2, 16)
    for form in (NATIVE, FP8):
        branch = BranchKV(lambda *_, form=form: Placement(form, False))
        branch.put(0, whole[:, 90:], whole[:, 90:])
        held = {tensor.untyped_storage().nbytes() for tensor in branch._kept.take(0)}
        assert max(held) <= 10 * 2 * 16 * 4


def test_other_sizes_in_one_run_are_counted_as_they_are() -> None:
    kept = RunKV(1)
    for name, tokens in (("cond", 10), ("uncond", 30)):
        kept.branch(1, name).put(0, torch.zeros(1, tokens, 2, 16), torch.zeros(1, tokens, 2, 16))
    assert kept.bytes_held == kept.predicted_bytes == 40 * 2 * 2 * 16 * 4


def test_the_size_of_a_run_is_read_from_the_transformer() -> None:
    model = qwen_transformer()
    from dittocache.families.registry import adapter_of

    size = reference_size(model, adapter_of(model), tokens=7, batch=2, element_size=4)
    assert size == ReferenceSize(tokens=7, batch=2, layers=3, heads=2, head_width=16, width=32, element_size=4)


class Recorded(PlainLink):
    """Notes what is fetched."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.fetched: list[int] = []

    def fetch(self, tensors: Any) -> Any:
        self.fetched.append(int(tensors[0][0]))
        return super().fetch(tensors)


def offloaded(blocks: int) -> tuple[OffloadedBlocks, Recorded]:
    link = Recorded(torch.device("cpu"))
    kept = OffloadedBlocks(lambda device: link)
    for block in range(blocks):
        kept.put(block, (torch.full((4,), block),))
    return kept, link


def test_the_next_block_is_fetched_while_one_is_computed_and_the_first_behind_the_last() -> None:
    kept, link = offloaded(3)
    for block in (0, 1, 2) * 2:
        assert kept.take(block)[0].tolist() == [block] * 4
        assert link.fetched[-1] == (block + 1) % 3
        assert len(kept._arriving) == 1
    assert link.fetched == [0, 1, 2, 0, 1, 2, 0]


def test_out_of_turn_blocks_come_all_the_same() -> None:
    kept, _ = offloaded(4)
    for block in (2, 0, 3, 3, 1):
        assert kept.take(block)[0].tolist() == [block] * 4
        assert len(kept._arriving) == 1


def test_what_was_on_its_way_is_not_taken_for_what_was_put_since() -> None:
    kept, _ = offloaded(2)
    kept.take(0)  # 1 is on its way
    kept.empty()
    assert kept.device_bytes == 0
    assert not kept._arriving
    for block in (0, 1):
        kept.put(block, (torch.full((4,), 10 + block),))
    assert kept.take(1)[0].tolist() == [11] * 4
    kept.put(0, (torch.full((2,), 7),))  # of another size, while it is on its way
    assert kept.take(0)[0].tolist() == [7, 7]


def test_memory_on_the_host_is_used_again_at_a_refresh() -> None:
    kept, _ = offloaded(2)
    before = [tensor.data_ptr() for block in range(2) for tensor in kept._host[block]]
    kept.empty()
    for block in range(2):
        kept.put(block, (torch.full((4,), 10 + block),))
    assert [tensor.data_ptr() for block in range(2) for tensor in kept._host[block]] == before
    assert kept.host_bytes == 2 * 4 * 8


def test_a_lone_block_is_not_fetched_twice() -> None:
    kept, link = offloaded(1)
    kept.take(0)
    assert link.fetched == [0]


def test_bytes_follow_what_is_put_and_dropped() -> None:
    for kept in (DeviceBlocks(), OffloadedBlocks(PlainLink)):
        kept.put(0, (torch.zeros(4),))
        kept.put(0, (torch.zeros(2),))
        kept.put(1, (torch.zeros(8),))
        assert kept.device_bytes == 40
        kept.drop(1)
        assert kept.device_bytes == 8
        assert kept.host_bytes in (0, 8)
        kept.drop(0)
        assert kept.device_bytes == kept.host_bytes == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_copies_run_beside_the_computation_and_come_out_the_same() -> None:
    from dittocache.referencekv.offload import link_to

    device = torch.device("cuda")
    kept = OffloadedBlocks(link_to)
    weight = torch.randn(2048, 2048, device=device) / 2048**0.5
    for block in range(6):
        busy = torch.randn(2048, 2048, device=device)
        for _ in range(10):
            busy = busy @ weight  # what is put is still being computed when it is sent
        kept.put(block, (torch.full((1 << 22,), float(block), device=device) + 0 * busy[0, 0],))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    right = torch.ones((), dtype=torch.bool, device=device)
    for block in [*range(6)] * 5:
        found = kept.take(block)[0]
        busy = weight
        for _ in range(10):
            busy = busy @ weight
        right &= (found + 0 * busy[0, 0] == block).all()
    assert bool(right)
    assert torch.cuda.max_memory_allocated() - before < 5 * (1 << 24) + 4 * weight.nbytes
