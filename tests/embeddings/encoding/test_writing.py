"""Writes beside the encoder's work: bounded, in an order that readers can follow, and never lost in silence."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dittocache.embeddings.encoding import storage_costs
from dittocache.embeddings.encoding.storage_costs import StorageCosts
from dittocache.embeddings.encoding.writing import RecordWriter, WrittenBatch
from dittocache.embeddings.recipe import recipe_key
from dittocache.embeddings.store.store import NewRecord, Store
from dittocache.errors import StoreUnavailableError


def record(
    number: int, artifact: str = "image_latents", tensor: torch.Tensor | None = None, **fields: Any
) -> NewRecord:
    recipe = {"artifact": artifact, "number": number, **fields}
    return NewRecord(recipe_key(recipe), torch.full((4, 3), float(number)) if tensor is None else tensor, recipe)


class GatedStore(Store):
    """Writes wait until a gate is open; the order in which they end is kept."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gate = threading.Event()
        self.written: list[str] = []
        self.fails: set[str] = set()

    def write_many(self, records: Sequence[NewRecord], **options: Any) -> list[int]:
        assert self.gate.wait(20)
        if self.fails & {record.key for record in records}:
            raise StoreUnavailableError("the disk is full")
        lengths = super().write_many(records, **options)
        self.written += [record.key for record in records]
        return lengths


@pytest.fixture
def store(tmp_path: Path) -> GatedStore:
    return GatedStore(tmp_path)


def test_what_is_reported_is_durable_and_complete(store: GatedStore) -> None:
    store.gate.set()
    with RecordWriter(store) as writer:
        finished = [done for number in range(5) for done in writer.submit([record(number)], samples=3)]
        finished += writer.drain()
    assert [(one.samples, one.records) for one in finished] == [(3, 1)] * 5
    assert sum(one.bytes for one in finished) == sum(store.bytes_of(record(number).key) for number in range(5))
    for number in range(5):
        assert torch.equal(store.read(record(number).key), record(number).tensor)


def test_compute_goes_on_while_a_bounded_number_of_batches_is_written(store: GatedStore) -> None:
    with RecordWriter(store, batches=2) as writer:
        assert writer.submit([record(0)], 1) == writer.submit([record(1)], 1) == []  # nothing is written, yet no wait
        waiting = threading.Thread(target=writer.submit, args=([record(2)], 1))
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive(), "a third batch must wait for the first"
        store.gate.set()
        waiting.join(20)
        assert not waiting.is_alive()
        writer.drain()
    assert {record(number).key for number in range(3)} == set(store.written)


def test_a_base_is_stored_before_the_record_that_shares_its_rows(store: GatedStore) -> None:
    rows = torch.arange(12.0).reshape(4, 3)
    base = record(0, "empty_prompt_embeds", rows)
    longer = torch.cat([rows, torch.ones(1, 3)])
    dependents = [
        record(number, "prompt_embeds", longer, storage={"rows_shared_with": base.key}) for number in range(1, 12)
    ]
    store.gate.set()
    with RecordWriter(store) as writer:
        writer.submit([*dependents, base], 1)
        writer.drain()
    assert store.written[0] == base.key
    for one in dependents:
        assert torch.equal(store.read(one.key), longer)
        assert store.header(one.key).end < store.header(base.key).end + 200  # one row, not five


def test_a_failing_write_ends_the_work_once_the_others_are_stored(store: GatedStore) -> None:
    store.fails = {record(1).key}
    store.gate.set()
    with RecordWriter(store, batches=9) as writer:
        for number in range(4):
            writer.submit([record(number), record(10 + number)], 1) if number != 1 else writer._batches.append(
                (1, [writer._threads.submit(writer._write, [record(1)], None, [])])
            )
        with pytest.raises(StoreUnavailableError, match="disk is full"):
            writer.drain()
        assert set(store.written) == {record(number).key for number in (0, 10, 2, 12, 3, 13)}
        assert writer.drain() == []


def test_a_record_is_replaced_only_on_request(store: GatedStore) -> None:
    store.gate.set()
    first, second = record(1), record(1, tensor=torch.zeros(4, 3))
    for replace, expected in ((False, first), (True, second)):
        with RecordWriter(store, replace=replace) as writer:
            writer.submit([first if not replace else second], 1)
            writer.drain()
        assert torch.equal(store.read(first.key), expected.tensor)


def test_an_empty_batch_counts_its_samples(store: GatedStore) -> None:
    with RecordWriter(store) as writer:
        writer.submit([], 2)
        assert writer.drain() == [WrittenBatch(2, 0, 0)]


def test_the_error_of_a_form_is_measured_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_costs, "MEASURED_FIRST", 2)
    monkeypatch.setattr(storage_costs, "MEASURED_EVERY", 4)
    costs = StorageCosts()
    fp8 = {"artifact": "prompt_embeds", "storage": {"dtype": "fp8_e4m3_token"}}
    tokens = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    for _ in range(8):
        costs.measure(tokens, fp8)
    costs.measure(torch.full((2, 2), 1e6), {"artifact": "image_latents", "storage": {"dtype": "float16"}})
    costs.measure(tokens, {"artifact": "control_latents"})
    kept, changed = costs.lines()
    assert kept.startswith("1 image_latents kept in the encoder's dtype: float16 ends at 65504")
    assert changed.startswith("prompt_embeds stored as fp8 per token: relative RMS 2.")
    assert "worst token cosine .99" in changed and changed.endswith("(measured on 4 of 8 records)")
