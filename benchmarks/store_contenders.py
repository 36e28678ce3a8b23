"""The ways to keep a cached sample on disk that `store.py` compares, each as its users would write and read it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.reading.reader import CachedBatches
from dittocache.embeddings.recipe import recipe_key
from dittocache.embeddings.store.bulk import PackWriter
from dittocache.embeddings.store.store import Store

Tensors = dict[str, torch.Tensor]
Batches = Sequence[Sequence[int]]
WRITERS = 4  # threads that write our loose records, as encoding has them


class Contender(Protocol):
    """One format.

    Attributes:
        name: for the table.
        plain, fsynced: whether it can write in this way.
    """

    name: str
    plain: bool
    fsynced: bool

    def prepare(self, folder: Path, samples: Sequence[Tensors]) -> None:
        """What comes before writing and is not measured; the folder is empty."""
        ...

    def write(self, folder: Path, samples: Sequence[Tensors], fsync: bool) -> None:
        """Write all samples into the folder."""
        ...

    def readers(self, folder: Path, shapes: Tensors) -> dict[str, Callable[[Batches], Iterator[Tensors]]]:
        """Ways of reading batches, by name; `shapes` is one sample."""
        ...


def in_rows(shapes: Tensors, load: Callable[[int], Tensors]) -> Callable[[Batches], Iterator[Tensors]]:
    """One thread loads samples and copies them into the rows of a batch, whose memory is used again."""
    rows: Tensors = {}

    def read(batches: Batches) -> Iterator[Tensors]:
        for batch in batches:
            if not rows or len(rows["img_shapes"]) != len(batch):
                rows.update(
                    {name: torch.empty(len(batch), *one.shape, dtype=one.dtype) for name, one in shapes.items()}
                )
            for row, number in enumerate(batch):
                for name, tensor in load(number).items():
                    rows[name][row].copy_(tensor)
            yield rows

    return read


class FromScratch:
    """Nothing comes before writing."""

    def prepare(self, folder: Path, samples: Sequence[Tensors]) -> None:
        pass


class PickleFiles(FromScratch):
    """`.pt`, one for each key: the layout of the spec's manager."""

    name = ".pt per key"
    plain = fsynced = True

    def write(self, folder: Path, samples: Sequence[Tensors], fsync: bool) -> None:
        for number, sample in enumerate(samples):
            for name, tensor in sample.items():
                path = folder / name / f"{number:06d}.pt"
                path.parent.mkdir(exist_ok=True)
                with path.open("wb") as stream:
                    torch.save(tensor, stream)
                    sync(stream, fsync)

    def readers(self, folder: Path, shapes: Tensors) -> dict[str, Callable[[Batches], Iterator[Tensors]]]:
        names = list(shapes)
        return {
            "one thread": in_rows(shapes, partial(load_pickles, folder, names, False)),
            "one thread, weights_only": in_rows(shapes, partial(load_pickles, folder, names, True)),
            "DataLoader, 2 workers": in_workers(PickleDataset(folder, names)),
        }


def load_pickles(folder: Path, names: Sequence[str], weights_only: bool, number: int) -> Tensors:
    return {name: torch.load(folder / name / f"{number:06d}.pt", weights_only=weights_only) for name in names}


@dataclass
class PickleDataset(torch.utils.data.Dataset[Tensors]):
    folder: Path
    names: list[str]

    def __getitem__(self, number: int) -> Tensors:
        return load_pickles(self.folder, self.names, False, number)


def in_workers(dataset: PickleDataset) -> Callable[[Batches], Iterator[Tensors]]:
    """Two worker processes, kept alive from one epoch to the next, collating as DataLoader does by default."""
    loaders: dict[int, Any] = {}

    def read(batches: Batches) -> Iterator[Tensors]:
        if len(batches) not in loaders:
            loaders[len(batches)] = torch.utils.data.DataLoader(
                dataset, batch_sampler=list(batches), num_workers=2, persistent_workers=True
            )
        yield from loaders[len(batches)]

    return read


class SafetensorsFiles(FromScratch):
    """Two safetensors files for each sample, latents and text, as musubi-tuner writes them."""

    name = "safetensors per sample"
    plain = fsynced = True

    def write(self, folder: Path, samples: Sequence[Tensors], fsync: bool) -> None:
        from safetensors.torch import save_file

        for number, sample in enumerate(samples):
            texts = {name: tensor for name, tensor in sample.items() if "prompt" in name}
            latents = {name: tensor for name, tensor in sample.items() if "prompt" not in name}
            for suffix, tensors in (("qie", latents), ("qie_te", texts)):
                path = folder / f"{number:06d}_{suffix}.safetensors"
                save_file(tensors, path)
                if fsync:
                    with path.open("rb") as stream:
                        os.fsync(stream.fileno())

    def readers(self, folder: Path, shapes: Tensors) -> dict[str, Callable[[Batches], Iterator[Tensors]]]:
        from safetensors.torch import load_file

        def load(number: int) -> Tensors:
            parts = (load_file(folder / f"{number:06d}_{suffix}.safetensors") for suffix in ("qie", "qie_te"))
            return {name: tensor for part in parts for name, tensor in part.items()}

        return {"one thread": in_rows(shapes, load)}


class Lmdb(FromScratch):
    """One value for each tensor, one transaction for each sample."""

    name = "LMDB"
    plain = fsynced = True

    def write(self, folder: Path, samples: Sequence[Tensors], fsync: bool) -> None:
        import lmdb

        with lmdb.open(str(folder), map_size=1 << 36, sync=fsync, metasync=fsync) as database:
            for number, sample in enumerate(samples):
                with database.begin(write=True) as transaction:
                    for name, tensor in sample.items():
                        transaction.put(f"{number}/{name}".encode(), raw(tensor))

    def readers(self, folder: Path, shapes: Tensors) -> dict[str, Callable[[Batches], Iterator[Tensors]]]:
        import lmdb

        database = lmdb.open(str(folder), map_size=1 << 36, readonly=True, lock=False, readahead=True)

        def load(number: int) -> Tensors:
            with database.begin(buffers=True) as transaction:
                return {
                    name: torch.frombuffer(transaction.get(f"{number}/{name}".encode()), dtype=one.dtype).view(
                        one.shape
                    )
                    for name, one in shapes.items()
                }

        return {"one thread": in_rows(shapes, load)}


class Litdata(FromScratch):
    """Lightning's streaming format, chunks of 64 MB, written by its own cache writer."""

    name = "litdata"
    plain, fsynced = True, False

    def write(self, folder: Path, samples: Sequence[Tensors], fsync: bool) -> None:
        from litdata.streaming.cache import Cache

        cache = Cache(str(folder), chunk_bytes=1 << 26)
        for number, sample in enumerate(samples):
            cache[number] = {name: bits(tensor) for name, tensor in sample.items()}
        cache.done()
        cache.merge()

    def readers(self, folder: Path, shapes: Tensors) -> dict[str, Callable[[Batches], Iterator[Tensors]]]:
        from litdata import StreamingDataset

        dataset = StreamingDataset(str(folder), shuffle=False)

        def load(number: int) -> Tensors:
            return {name: tensor.view(shapes[name].dtype) for name, tensor in dataset[number].items()}

        return {"one thread": in_rows(shapes, load)}


class LooseRecords(FromScratch):
    """Our store before packing: one durable, checksummed record for each tensor, written by a few threads."""

    name = "dittocache, loose"
    plain, fsynced = False, True

    def write(self, folder: Path, samples: Sequence[Tensors], fsync: bool) -> None:
        store = Store(folder)
        manifest: dict[str, dict[str, str]] = {}
        with ThreadPoolExecutor(WRITERS) as pool:
            written = []
            for number, sample in enumerate(samples):
                for name, tensor in sample.items():
                    recipe = like_a_recipe(name, number)
                    key = recipe_key(recipe)
                    manifest.setdefault(str(number), {})[name] = key
                    written.append(pool.submit(store.write, key, tensor, recipe))
            for one in written:
                one.result()
        (folder / "samples.json").write_text(json.dumps(manifest))

    def readers(self, folder: Path, shapes: Tensors) -> dict[str, Callable[[Batches], Iterator[Tensors]]]:
        reader = CachedBatches(Store(folder), Manifest(json.loads((folder / "samples.json").read_text())))

        def one_thread(batches: Batches) -> Iterator[Tensors]:
            for batch in batches:
                yield reader.batch([str(number) for number in batch])

        def ahead(threads: int, batches: Batches) -> Iterator[Tensors]:
            return reader.prefetch_batches(([str(number) for number in batch] for batch in batches), threads)

        return {"one thread": one_thread, "2 threads": partial(ahead, 2)}


class PackedRecords(FromScratch):
    """Our store as `dittocache cache import` fills it: checksummed records, synced as packs."""

    name = "dittocache, packed"
    plain, fsynced = False, True

    def write(self, folder: Path, samples: Sequence[Tensors], fsync: bool) -> None:
        manifest: dict[str, dict[str, str]] = {}
        with PackWriter(Store(folder)) as packs:
            for number, sample in enumerate(samples):
                for name, tensor in sample.items():
                    recipe = like_a_recipe(name, number)
                    key = recipe_key(recipe)
                    manifest.setdefault(str(number), {})[name] = key
                    packs.write(key, tensor, recipe)
        (folder / "samples.json").write_text(json.dumps(manifest))

    def readers(self, folder: Path, shapes: Tensors) -> dict[str, Callable[[Batches], Iterator[Tensors]]]:
        return LooseRecords().readers(folder, shapes)


def like_a_recipe(artifact: str, number: int) -> dict[str, Any]:
    """As long as the recipe of an Edit-Plus artifact."""
    return {"schema": 1, "artifact": artifact, "number": number, "encoder": {"config": "c" * 900}}


def raw(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """For formats that do not know bfloat16."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def sync(stream: Any, wanted: bool) -> None:
    if wanted:
        stream.flush()
        os.fsync(stream.fileno())


def contenders() -> tuple[list[Contender], list[str]]:
    """Those that can take part, and a line for each that cannot."""
    found: list[Contender] = [PickleFiles(), SafetensorsFiles()]
    missing = []
    for module, contender in (("lmdb", Lmdb()), ("litdata", Litdata())):
        if find_spec(module) is None:
            missing.append(f"{module} is not installed (pip install 'dittocache[bench]'): left out")
        else:
            found.append(contender)
    return [*found, LooseRecords(), PackedRecords()], missing
