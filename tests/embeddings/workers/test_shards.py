"""Every worker cuts the same shards; together they hold every record once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from dittocache.data.sample import Sample
from dittocache.embeddings.encoding.shards import Shard, make_shards
from dittocache.embeddings.planning.plan import Need


def need(number: int, size: tuple[int, int] = (64, 64), **keys: str) -> Need:
    return Need(Sample(f"sample-{number}", Path("t"), (), "", size), keys or {"latents": f"key-{number}"})


def keys_of(shards: list[Shard]) -> list[str]:
    return [key for shard in shards for one in shard.needs for key in one.keys.values()]


@pytest.mark.parametrize("count", [1, 5, 40, 700])
@pytest.mark.parametrize("batch_size", [1, 3, 16, 100])
def test_each_record_is_in_one_shard_of_whole_batches(count: int, batch_size: int) -> None:
    shards = make_shards([need(number) for number in range(count)], batch_size)
    assert Counter(keys_of(shards)) == {f"key-{number}": 1 for number in range(count)}
    assert all(len(shard.needs) % batch_size == 0 for shard in shards[:-1])
    assert all(len(shard.needs) <= max(32 + batch_size // 2, batch_size) for shard in shards)


def test_a_small_set_is_cut_for_several_workers() -> None:
    assert len(make_shards([need(number) for number in range(40)], 4)) == 10


def test_names_follow_from_the_keys_alone() -> None:
    needs = [need(number) for number in range(100)]
    shards = make_shards(needs, 4)
    assert [shard.name for shard in make_shards(needs, 4)] == [shard.name for shard in shards]
    assert len({shard.name for shard in shards}) == len(shards)
    needs[7] = need(7, latents="another")
    changed = [one.name != other.name for one, other in zip(make_shards(needs, 4), shards, strict=True)]
    assert sum(changed) == 1


def test_samples_of_one_size_stand_together() -> None:
    sizes = [(64, 64), (32, 128), (128, 32)]
    shards = make_shards([need(number, sizes[number % 3]) for number in range(90)], 4)
    assert all(len({one.sample.size for one in shard.needs}) == 1 for shard in shards)


def test_a_shared_record_belongs_to_the_first_sample_that_has_not_failed() -> None:
    needs = [need(0, text="shared"), need(1, text="shared", more="own"), need(2, text="shared")]
    assert [dict(one.keys) for shard in make_shards(needs, 4) for one in shard.needs] == [
        {"text": "shared"},
        {"more": "own"},
    ]
    left = make_shards(needs, 4, failed={"sample-0"})
    assert [dict(one.keys) for shard in left for one in shard.needs] == [{"text": "shared", "more": "own"}]


def test_the_base_of_a_record_is_in_its_shard_though_another_sample_shares_it() -> None:
    needs = [need(number, empty="base", prompt=f"prompt-{number}") for number in range(64)]
    bases = {f"prompt-{number}": "base" for number in range(64)}
    shards = make_shards(needs, 1, base_of=bases.get)
    assert len(shards) > 1
    assert all({"base"} < shard.keys for shard in shards)
    repeated = [replace(one, keys={"empty": "base"}) for one in needs[1:]]
    assert len(keys_of(make_shards([needs[0], *repeated], 1, base_of=bases.get))) == 2  # nothing but the base: left out
