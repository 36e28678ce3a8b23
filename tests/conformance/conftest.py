"""The suite that every model family must pass: which families there are, and what each promises.

A test marked `capability("...")` runs for every case that lists the capability; nothing is skipped. A new family is a
new entry in CASES.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image

from dittocache.data.sample import Sample
from dittocache.demo.tiny import save_tiny, tiny_pipeline
from dittocache.families.base import Family, Sizes, Tensors
from dittocache.families.registry import get_family

SIZES = Sizes(resolution=96, condition_resolution=64)

# What a family can promise. Each word is the argument of a `capability` mark.
CAPABILITIES = frozenset(
    {
        "artifacts",  # names every tensor and all that determines it
        "encoding",  # computes what the stock pipeline computes, with one encoder in memory at a time
        "training",  # feeds the transformer what the stock pipeline feeds it
        "lora",  # LoRA targets fit, and what is saved loads in the stock pipeline
        "step_cache",  # one forward pass taken apart for TeaCache
        "references",  # reference tokens after the noise tokens
    }
)


@dataclass(frozen=True)
class Case:
    """One checkpoint kind of a family, as a tiny pipeline."""

    family_name: str
    capabilities: frozenset[str]
    controls: int
    tiny: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def text_sees_controls(self) -> bool:
        """Whether reference pictures are shown to the text encoder too."""
        return self.controls > 0 and self.family_name.startswith("qwen")

    @property
    def id(self) -> str:
        return "-".join([self.family_name, *(f"{name}={value}" for name, value in self.options.items())])


EDIT = "qwen-image-edit-plus"
CASES = (
    Case("qwen-image", CAPABILITIES - {"references"}, 0, "qwen-image"),
    Case("qwen-image-edit", CAPABILITIES, 1, "qwen-image-edit"),
    Case(EDIT, CAPABILITIES, 2, EDIT),
    Case(EDIT, CAPABILITIES, 2, EDIT, {"zero_cond_t": True}),
    Case("flux", CAPABILITIES - {"references"}, 0, "flux"),
    Case("flux-schnell", CAPABILITIES - {"references"}, 0, "flux-schnell"),
    Case("flux-kontext", CAPABILITIES, 1, "flux-kontext"),
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "capability(name): runs for every family case that has the capability")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        [name] = metafunc.definition.get_closest_marker("capability").args
        assert name in CAPABILITIES, name
        cases = [case for case in CASES if name in case.capabilities]
        metafunc.parametrize("case", cases, ids=[case.id for case in cases])


@pytest.fixture
def family(case: Case) -> Family:
    return get_family(case.family_name)


@pytest.fixture
def pipe(case: Case) -> Any:
    return tiny_pipeline(case.tiny, **case.options)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a case's tiny pipeline, saved once a session."""
    folders: dict[str, Path] = {}

    def folder_of(case: Case) -> Path:
        if case.id not in folders:
            folders[case.id] = save_tiny(tmp_path_factory.mktemp("model") / case.id, case.tiny, **case.options)
        return folders[case.id]

    return folder_of


def draw(path: Path, seed: int, size: tuple[int, int]) -> Path:
    """A picture of random blocks, so that resampling has something to do."""
    pixels = random.Random(seed).randbytes(3 * 6 * 5)
    Image.frombytes("RGB", (6, 5), pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def samples(case: Case, tmp_path: Path) -> list[Sample]:
    """Three samples of one bucket with prompts of different lengths, the controls of two shapes."""
    shapes = [(80, 60), (64, 96)]
    prompts = ["make it red", "remove the small square on the left", "a"]
    return [
        Sample(
            name=f"sample-{index}",
            target=draw(tmp_path / f"target-{index}.png", index, (100, 75)),
            controls=tuple(
                draw(tmp_path / f"control-{index}-{slot}.png", 10 * index + slot + 5, shapes[slot])
                for slot in range(case.controls)
            ),
            prompt=prompt,
            size=(128, 96),
        )
        for index, prompt in enumerate(prompts)
    ]


def encode_all(family: Family, pipe: Any, samples: list[Sample], sizes: Sizes = SIZES) -> list[Tensors]:
    """All artifacts of each sample."""
    tensors: list[Tensors] = [{} for _ in samples]
    for encoder in (*family.encoders, None):
        for merged, part in zip(tensors, family.encode(pipe, encoder, samples, sizes), strict=True):
            merged.update(part)
    return tensors


def preferred_sizes(resolution: int) -> list[tuple[int, int]]:
    """Kontext's sizes of one megapixel, at the area of `resolution` squared."""
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    scale = resolution / 1024 / 16
    return [(round(width * scale) * 16, round(height * scale) * 16) for width, height in PREFERRED_KONTEXT_RESOLUTIONS]


@contextmanager
def _pipeline_areas(sizes: Sizes) -> Iterator[None]:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit

    module = "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus"
    stock = pipeline_qwenimage_edit.calculate_dimensions
    with ExitStack() as stack:
        resized = lambda _, ratio: stock(sizes.resolution**2, ratio)  # noqa: E731
        stack.enter_context(mock.patch.object(pipeline_qwenimage_edit, "calculate_dimensions", resized))
        stack.enter_context(mock.patch(f"{module}.VAE_IMAGE_SIZE", sizes.resolution**2))
        stack.enter_context(mock.patch(f"{module}.CONDITION_IMAGE_SIZE", sizes.condition_resolution**2))
        kontext = "diffusers.pipelines.flux.pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS"
        stack.enter_context(mock.patch(kontext, preferred_sizes(sizes.resolution)))
        yield


def first_forward(pipe: Any, sample: Sample, sizes: Sizes = SIZES) -> dict[str, Any]:
    """What the stock pipeline's own call passes to its transformer at the first step of this sample."""
    seen: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    width, height = sample.size
    options: dict[str, Any] = {"guidance_scale": 1.0} if "Flux" in type(pipe).__name__ else {"true_cfg_scale": 1.0}
    if "Kontext" in type(pipe).__name__:
        options["max_area"] = width * height
    if sample.controls:
        images = [Image.open(path) for path in sample.controls]
        # The first Qwen-Image-Edit would show its text encoder a list as it is, not resized.
        options["image"] = images[0] if type(pipe).__name__ == "QwenImageEditPipeline" else images
    try:
        with _pipeline_areas(sizes):
            pipe(
                prompt=sample.prompt,
                width=width,
                height=height,
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(1),
                output_type="latent",
                **options,
            )
    finally:
        hook.remove()
    return seen[0]


@pytest.fixture
def sizes() -> Sizes:
    return SIZES


@pytest.fixture(name="draw")
def draw_fixture() -> Any:
    return draw


@pytest.fixture(name="encode_all")
def encode_all_fixture() -> Any:
    return encode_all


@pytest.fixture(name="first_forward")
def first_forward_fixture() -> Any:
    return first_forward


@pytest.fixture
def all_cases() -> tuple[Case, ...]:
    return CASES


@pytest.fixture
def forward_kwargs(family: Family, pipe: Any, samples: list[Sample]) -> dict[str, Any]:
    """A transformer call of the stock pipeline, at a timestep in mid-course."""
    kwargs = first_forward(pipe, samples[0])
    return {**kwargs, "timestep": torch.full_like(kwargs["timestep"], 0.6)}
