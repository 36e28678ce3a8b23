"""A model family whose encoders are hashes: every bit of a tensor tells what it was made from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from PIL import Image

from dittocache.data.digests import ContentIndex
from dittocache.data.sample import Sample
from dittocache.embeddings.encoding.encode import EncodeResult, encode_missing
from dittocache.embeddings.planning.manifest import Manifest
from dittocache.embeddings.planning.plan import Plan, make_plan
from dittocache.embeddings.store.storage import Storage
from dittocache.embeddings.store.store import Store
from dittocache.errors import DataError
from dittocache.events import EventLog
from dittocache.families.base import Artifact, ArtifactInput, Batching, Sizes, Tensors
from dittocache.families.pictures import PictureRequest, Pictures, resized_picture

ENCODERS = ("vae", "text_encoder", None)


class ToyVae:
    use_tiling = False

    def enable_tiling(self) -> None:
        self.use_tiling = True

    def disable_tiling(self) -> None:
        self.use_tiling = False


@dataclass
class ToyPipeline:
    weights: dict[str, bytes]
    dtype: torch.dtype
    vae: ToyVae = field(default_factory=ToyVae)


@dataclass
class ToyFamily:
    """A family with a VAE and a text encoder, and a log of what they encoded.

    `memory` samples fit an encoder at once; the `large` ones only where the VAE takes them in tiles.
    """

    log: Path
    seconds: float = 0.0
    memory: int = 1000
    template: str = "Describe: {}"
    large: frozenset[str] = frozenset()
    name: str = "toy"
    pipeline_class_name: str = "ToyPipeline"
    encoders: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"vae": (), "text_encoder": ("tokenizer",)})
    size_multiple: int = 16
    lora_targets: tuple[str, ...] = ()
    transformer: Any = None

    def artifacts(self, sample: Sample, sizes: Sizes, size_of: Any = None) -> list[Artifact]:
        controls = tuple(ArtifactInput("control", file=path) for path in sample.controls)
        target = (ArtifactInput("target", file=sample.target),)
        prompt = (*controls, ArtifactInput("prompt", text=sample.prompt))
        empty = (*controls, ArtifactInput("prompt", text=""))
        size = {"size": list(sample.size)}
        text = {"area": sizes.condition_resolution**2, "template": self.template}
        return [
            Artifact("image_latents", "vae", target, size),
            Artifact("control_latents", "vae", controls, {"area": sizes.resolution**2}),
            Artifact("prompt_embeds", "text_encoder", prompt, text),
            Artifact("prompt_embeds_mask", "text_encoder", prompt, text),
            Artifact("empty_prompt_embeds", "text_encoder", empty, text),
            Artifact("empty_prompt_embeds_mask", "text_encoder", empty, text),
            Artifact("img_shapes", None, controls, size),
        ]

    def load_pipeline(self, model: str, components: Collection[str], dtype: torch.dtype, device: Any) -> ToyPipeline:
        self._log("load", sorted(components))
        folders = [Path(model, name) for name in components]
        return ToyPipeline({f.name: b"".join(p.read_bytes() for p in sorted(f.glob("*.s*"))) for f in folders}, dtype)

    def pictures(
        self, encoder: str | None, sample: Sample, sizes: Sizes, wanted: Collection[str] | None = None
    ) -> list[PictureRequest]:
        paths = [one.file for a in self.artifacts(sample, sizes) for one in a.inputs if a.encoder == encoder]
        return [PictureRequest(path, size=(8, 8)) for path in dict.fromkeys(paths) if path is not None]

    def encode(
        self,
        pipe: ToyPipeline | None,
        encoder: str | None,
        samples: Sequence[Sample],
        sizes: Sizes,
        *,
        wanted: Sequence[Collection[str]] | None = None,
        pictures: Pictures = resized_picture,
        together: bool = False,
    ) -> list[Tensors]:
        if encoder is not None and len(samples) > self.memory:
            raise torch.OutOfMemoryError("toy device: out of memory")
        if pipe is not None and not pipe.vae.use_tiling and self.large & {sample.name for sample in samples}:
            raise torch.OutOfMemoryError("toy device: out of memory")
        encoded = []
        for index, sample in enumerate(samples):
            time.sleep(self.seconds if encoder else 0)
            for request in self.pictures(encoder, sample, sizes):
                assert pictures(request).size == (8, 8)
            tensors = self._tensors(pipe, encoder, sample, sizes)
            names = tensors.keys() if wanted is None else wanted[index]
            encoded.append({name: tensor for name, tensor in tensors.items() if name in names})
            self._log("encode", [encoder, sample.name])
        return encoded

    def training_inputs(self, batch: Any, noise: Any, sigmas: Any) -> Any:
        raise NotImplementedError

    def logged(self, word: str) -> list[list[Any]]:
        """What follows `word` in each of its log lines."""
        if not self.log.exists():
            return []
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [rest for first, rest in lines if first == word]

    def _log(self, word: str, rest: Any) -> None:
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, (json.dumps([word, rest]) + "\n").encode())
        os.close(descriptor)

    def _tensors(self, pipe: ToyPipeline | None, encoder: str | None, sample: Sample, sizes: Sizes) -> Tensors:
        tensors: Tensors = {}
        for artifact in self.artifacts(sample, sizes):
            if artifact.encoder != encoder:
                continue
            parts = [artifact.name.removesuffix("_mask"), json.dumps(dict(artifact.transform))]
            parts += [_content(one) for one in artifact.inputs]
            if encoder is None or pipe is None:
                tensors[artifact.name] = torch.tensor([[1, *sample.size]], dtype=torch.int32)
                continue
            seed = blake3("\0".join(parts).encode() + pipe.weights[str(encoder)]).digest()[:4]
            generator = torch.Generator().manual_seed(int.from_bytes(seed))
            tokens = torch.randn(8 + seed[0] % 8, 64, generator=generator).to(pipe.dtype)
            tensors[artifact.name] = tokens[:, 0] > 0 if artifact.name.endswith("_mask") else tokens
        return tensors


def _content(one: ArtifactInput) -> str:
    if one.file is None:
        return str(one.text)
    try:
        with Image.open(one.file) as picture:
            picture.load()
    except OSError as error:
        raise DataError(f"picture {one.file} cannot be read ({error})") from error
    return one.file.read_bytes().hex()


def picture(path: Path, *values: object) -> Path:
    """A small picture whose pixels follow from `values`; the file's length does not depend on them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = blake3(repr(values).encode()).digest(length=8 * 8 * 3)
    Image.frombytes("RGB", (8, 8), pixels).save(path, format="BMP")
    return path


@dataclass
class Job:
    """Everything that a caching run needs, so that a test changes one thing and caches again."""

    folder: Path
    samples: list[Sample]
    seconds: float = 0.0
    memory: int = 1000
    batch_size: int = 2
    dtype: torch.dtype = torch.bfloat16
    sizes: Sizes = field(default_factory=lambda: Sizes(64, 32))
    template: str = "Describe: {}"
    large: frozenset[str] = frozenset()
    batching: Batching = "exact"
    storage: Storage = field(default_factory=Storage)
    options: dict[str, Any] = field(default_factory=dict)
    previous: Manifest | None = None

    @property
    def family(self) -> ToyFamily:
        return ToyFamily(self.folder / "log", self.seconds, self.memory, self.template, self.large)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def store(self) -> Store:
        return Store(self.folder / "cache")

    def plan(self) -> Plan:
        index = ContentIndex(self.folder / "cache" / "content-index.json")
        samples = self.samples
        return make_plan(
            samples,
            self.family,
            self.sizes,
            self.model,
            self.dtype,
            self.store,
            index,
            previous=self.previous,
            storage=self.storage,
            batching=self.batching,
        )

    def encode(self, plan: Plan, encoders: Sequence[str | None] = ENCODERS) -> EncodeResult:
        log = EventLog(self.folder / "events.jsonl", "cache")
        where = (self.model, self.dtype, "cpu", self.batch_size, self.store, log)
        return encode_missing(plan, encoders, self.family, *where, **self.options)

    def cache(self) -> EncodeResult:
        """Plan and encode, as one process would; keeps the manifest for the next time."""
        plan = self.plan()
        result = self.encode(plan)
        self.previous = plan.manifest
        return result

    def expected(self) -> dict[str, Tensors]:
        """What every sample's tensors must be, computed without any cache."""
        unlogged = replace(self.family, log=Path(os.devnull), seconds=0.0, memory=1000, large=frozenset())
        tensors: dict[str, Tensors] = {sample.name: {} for sample in self.samples}
        for encoder, beside in (*unlogged.encoders.items(), (None, ())):
            pipe = unlogged.load_pipeline(str(self.model), [encoder, *beside], self.dtype, "cpu") if encoder else None
            for sample in self.samples:
                tensors[sample.name] |= unlogged.encode(pipe, encoder, [sample], self.sizes)[0]
        return tensors


def make_job(folder: Path, count: int = 6, **settings: Any) -> Job:
    """A job with a small model and `count` samples."""
    for component in ("vae", "text_encoder", "tokenizer"):
        (folder / "model" / component).mkdir(parents=True)
    classes = {"vae": ["toy", "Vae"], "text_encoder": ["transformers", "Text"], "tokenizer": ["transformers", "Words"]}
    (folder / "model/model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline", **classes}))
    for encoder in ("vae", "text_encoder"):
        (folder / "model" / encoder / "config.json").write_text('{"width": 64}')
        (folder / "model" / encoder / "model.safetensors").write_bytes(b"weights of " + encoder.encode())
    (folder / "model/tokenizer/tokenizer.json").write_text("{}")
    samples = [
        Sample(
            name=f"sample-{number:02d}",
            target=picture(folder / f"set/images/{number:02d}.bmp", "target", number),
            controls=(picture(folder / f"set/control/{number:02d}.bmp", "control", number),),
            prompt=f"paint it {number}",
            size=(64, 64),
        )
        for number in range(count)
    ]
    return Job(folder, samples, **settings)
