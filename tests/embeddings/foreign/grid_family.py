"""A family whose latents have the sizes that pictures ask for, and caches as qflux and musubi-tuner write them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors.torch import save_file
from tests.embeddings.toy_family import picture

from dittocache.data.digests import ContentIndex
from dittocache.data.pictures import picture_size
from dittocache.data.sample import Sample
from dittocache.embeddings.planning.plan import Plan, make_plan
from dittocache.embeddings.store.store import Store
from dittocache.events import EventLog, read_events
from dittocache.families.base import Artifact, ArtifactInput, Sizes, Tensors

CHANNELS, WIDTH = 16, 32  # of the VAE and of the text encoder
SIZES = Sizes(64, 32)


@dataclass
class GridFamily:
    """What an encoder gives follows from its weights and the inputs' contents; latents have the pictures' grids."""

    name: str = "qwen-image-edit-plus"
    pipeline_class_name: str = "ToyPipeline"
    encoders: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"vae": (), "text_encoder": ("tokenizer",)})
    size_multiple: int = 16
    lora_targets: tuple[str, ...] = ()
    transformer: Any = None
    dtype: torch.dtype = torch.bfloat16

    def artifacts(self, sample: Sample, sizes: Sizes, size_of: Any = None) -> list[Artifact]:
        controls = tuple(ArtifactInput("control", file=path) for path in sample.controls)
        prompt = (*controls, ArtifactInput("prompt", text=sample.prompt))
        empty = (*controls, ArtifactInput("prompt", text=""))
        size, area = {"size": list(sample.size)}, {"area": sizes.resolution**2}
        texts = [("prompt_embeds", prompt), ("empty_prompt_embeds", empty)]
        return [
            Artifact("image_latents", "vae", (ArtifactInput("target", file=sample.target),), size),
            Artifact("control_latents", "vae", controls, area),
            *(Artifact(name + end, "text_encoder", inputs) for name, inputs in texts for end in ("", "_mask")),
            Artifact("img_shapes", None, controls, {**size, **area}),
        ]

    def load_pipeline(self, model: str, components: Sequence[str], dtype: torch.dtype, device: Any) -> bytes:
        return Path(model, components[0], "model.safetensors").read_bytes()

    def encode(self, pipe: Any, encoder: str | None, samples: Any, sizes: Sizes, **_: Any) -> list[Tensors]:
        return [self._tensors(pipe, encoder, sample, sizes) for sample in samples]

    def training_inputs(self, batch: Any, noise: Any, sigmas: Any) -> Any:
        raise NotImplementedError

    def _tensors(self, pipe: bytes | None, encoder: str | None, sample: Sample, sizes: Sizes) -> Tensors:
        side = sizes.resolution // 16
        grids = [(sample.size[1] // 16, sample.size[0] // 16), *((side, side + 1) for _ in sample.controls)]
        if encoder is None:
            return {"img_shapes": torch.tensor([(1, *grid) for grid in grids], dtype=torch.int32)}
        if encoder == "vae":
            tokens = {"image_latents": grids[:1], "control_latents": grids[1:]}
            inputs = {"image_latents": [sample.target], "control_latents": list(sample.controls)}
            return {
                name: self._random(pipe, sum(h * w for h, w in tokens[name]), 4 * CHANNELS, *inputs[name])
                for name in tokens
            }
        tensors: Tensors = {}
        for prefix, prompt in (("", sample.prompt), ("empty_", "")):
            embeds = self._random(pipe, 5 + len(prompt), WIDTH, *sample.controls, prompt)
            tensors[f"{prefix}prompt_embeds"] = embeds
            tensors[f"{prefix}prompt_embeds_mask"] = torch.ones(len(embeds), dtype=torch.bool)
        return tensors

    def _random(self, weights: bytes | None, tokens: int, width: int, *inputs: Path | str) -> torch.Tensor:
        contents = [one.read_bytes() if isinstance(one, Path) else one.encode() for one in inputs]
        seed = int.from_bytes(blake3(b"\0".join([weights or b"", *contents])).digest()[:4])
        return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(self.dtype)


@dataclass
class Job:
    """A data set, a model, a store."""

    folder: Path
    samples: list[Sample]
    family: GridFamily = field(default_factory=GridFamily)
    sizes: Sizes = SIZES
    dtype: torch.dtype = torch.bfloat16

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def store(self) -> Store:
        return Store(self.folder / "cache")

    @property
    def log(self) -> EventLog:
        return EventLog(self.folder / "events.jsonl", "import")

    @property
    def messages(self) -> list[str]:
        return [event["text"] for event in read_events(self.folder / "events.jsonl") if event["kind"] == "message"]

    def plan(self) -> Plan:
        index = ContentIndex(self.folder / "cache" / "content-index.json")
        return make_plan(self.samples, self.family, self.sizes, self.model, self.dtype, self.store, index)

    def expected(self) -> dict[str, Tensors]:
        """What the encoders make of every sample."""
        tensors: dict[str, Tensors] = {}
        for sample in self.samples:
            tensors[sample.name] = {}
            for encoder in ("vae", "text_encoder", None):
                pipe = encoder and self.family.load_pipeline(str(self.model), [encoder], self.dtype, "cpu")
                tensors[sample.name] |= self.family.encode(pipe, encoder, [sample], self.sizes)[0]
        return tensors

    def stored(self) -> dict[str, Tensors]:
        """What the store has of every sample."""
        plan, store = self.plan(), self.store
        return {
            name: {artifact: store.read(key) for artifact, key in keys.items() if key in plan.stored}
            for name, keys in plan.manifest.samples.items()
        }


def make_job(folder: Path, count: int = 3, controls: int = 1) -> Job:
    for component, config in (("vae", {"z_dim": CHANNELS}), ("text_encoder", {"text_config": {"hidden_size": WIDTH}})):
        (folder / "model" / component).mkdir(parents=True)
        (folder / "model" / component / "config.json").write_text(json.dumps(config))
        (folder / "model" / component / "model.safetensors").write_bytes(component.encode())
    (folder / "model/tokenizer").mkdir()
    (folder / "model/tokenizer/tokenizer.json").write_text("{}")
    classes = {name: ["toy", name] for name in ("vae", "text_encoder", "tokenizer")}
    (folder / "model/model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline", **classes}))
    samples = [
        Sample(
            name=f"sample-{number}",
            target=picture(folder / f"set/images/sample-{number}.bmp", "target", number),
            controls=tuple(picture(folder / f"set/control/{number}-{i}.bmp", "c", number, i) for i in range(controls)),
            prompt=f"paint it {number}",
            size=(64, 48),
        )
        for number in range(count)
    ]
    return Job(folder, samples)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def write_qflux(
    folder: Path, samples: Sequence[Sample], tensors: dict[str, Tensors], dtype: torch.dtype | None = torch.float16
) -> None:
    """As qflux does: everything cast to float16, prompt embeddings named by the prompt, files overwritten."""
    for sample in samples:
        image, prompt = md5(sample.target.read_bytes()), md5(sample.prompt.encode())
        controls = [md5(path.read_bytes()) for path in sample.controls]
        metadata: dict[str, Any] = {"version": "2.0"}
        for key, tensor in tensors[sample.name].items():
            if key == "img_shapes":
                continue
            name = {"image_latents": image, "control_latents": "".join(controls)}.get(key, prompt)
            (folder / key).mkdir(parents=True, exist_ok=True)
            torch.save(tensor if dtype is None else tensor.to(dtype), folder / key / f"{name}.pt")
            metadata[key] = name
        (folder / "metadata").mkdir(exist_ok=True)
        main = image + (controls[0] if controls else "") + prompt
        (folder / "metadata" / f"{main}.json").write_text(json.dumps(metadata, indent=2))


def write_musubi(folder: Path, samples: Sequence[Sample], tensors: dict[str, Tensors], arch: str = "qie") -> None:
    """As musubi-tuner does: one file of unpacked latents and one of embeddings for each picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        own = tensors[sample.name]
        grids = [(int(h), int(w)) for _, h, w in own["img_shapes"].tolist()]
        latents = [unpacked(own["image_latents"], grids[0])]
        start = 0
        for h, w in grids[1:]:
            latents.append(unpacked(own["control_latents"][start : start + h * w], (h, w)))
            start += h * w
        named = {f"latents_{shape_of(latents[0])}_bfloat16": latents[0]}
        named |= {f"latents_control_{i}_{shape_of(one)}_bfloat16": one for i, one in enumerate(latents[1:])}
        width, height = picture_size(sample.target)
        metadata = {"architecture": "qwen_image", "format_version": "1.0.1"}
        size = {"width": str(width), "height": str(height)}
        save_file(
            named, folder / f"{sample.target.stem}_{width:04d}x{height:04d}_{arch}.safetensors", {**metadata, **size}
        )
        save_file(
            {"varlen_vl_embed_bfloat16": own["prompt_embeds"]},
            folder / f"{sample.target.stem}_{arch}_te.safetensors",
            {**metadata, "caption1": sample.prompt},
        )


def unpacked(packed: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(C, 1, 2h, 2w): element [c, 0, 2y + i, 2x + j] is packed[y * w + x, 4c + 2i + j]."""
    height, width = grid
    latents = torch.empty(packed.shape[1] // 4, 1, 2 * height, 2 * width, dtype=packed.dtype)
    for y in range(height):
        for x in range(width):
            latents[:, 0, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = packed[y * width + x].reshape(-1, 2, 2)
    return latents


def shape_of(latents: torch.Tensor) -> str:
    return "x".join(str(side) for side in latents.shape[1:])


def later(path: Path, seconds: float = 60) -> None:
    """Set a file's time of change after now."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + int(seconds * 1e9)))
