"""Stage `encode`: compute every latent and every prompt embedding once, through the stock pipeline's own methods."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import QwenImageEditPlusPipeline
from PIL import Image

from dittocache.demo.edits import Edit, evaluation_edits, training_edits
from dittocache.demo.model import load_pipeline
from dittocache.demo.scenes import Scene, draw
from dittocache.demo.train.plane import encode_mean, to_plane
from dittocache.demo.train.run import Log, save_checkpoint, to_tensor
from dittocache.demo.train.text import CONDITION_SIDE

CHUNK = 1000  # edits a file
TEXT_LENGTH = 22  # tokens of the longest prompt, image tokens included
EMPTY_PROMPT = " "  # the negative prompt that true classifier-free guidance is used with


def chunk_edits(index: int) -> list[Edit]:
    """The edits of one chunk of the training set; chunk -1 is the held-out evaluation set, for the loss on it."""
    return evaluation_edits(128) if index < 0 else training_edits(CHUNK, seed=index)


def encode_chunks(
    work_dir: Path,
    model_dir: Path,
    count: int,
    rank: int = 0,
    world: int = 1,
    parts: tuple[str, ...] = ("prompts", "latents"),
) -> None:
    """Write `data/prompts-*.pt` and `data/latents-*.pt` for this rank's share of `count` chunks and the held-out one.

    Files that exist already are kept, so an interrupted run goes on where it stopped.
    """
    torch.set_num_threads(1)
    log = Log(work_dir / "log.jsonl", "encode")
    pipeline = load_pipeline(folder=model_dir)
    for index in [-1, *range(count)]:
        if index % world != rank:
            continue
        edits = chunk_edits(index)
        for part in parts:
            path = chunk_path(work_dir, part, index)
            if path.is_file():
                continue
            save_checkpoint(
                path, encode_prompts(pipeline, edits) if part == "prompts" else encode_latents(pipeline, edits)
            )
            log.write(part=part, chunk=index, edits=len(edits))


def chunk_path(work_dir: Path, part: str, index: int) -> Path:
    """Where a chunk's prompts or latents lie."""
    return work_dir / "data" / f"{part}-{'heldout' if index < 0 else format(index, '03d')}.pt"


def sources_of(edits: list[Edit]) -> tuple[list[Scene], torch.Tensor]:
    """The distinct source scenes in order of appearance, and each edit's index (N,) into them."""
    places: dict[Scene, int] = {}
    index = [places.setdefault(edit.source, len(places)) for edit in edits]
    return list(places), torch.tensor(index)


@torch.no_grad()
def encode_prompts(pipeline: QwenImageEditPlusPipeline, edits: list[Edit]) -> dict[str, torch.Tensor]:
    """Embeddings (N, 22, 128) float16 with lengths (N,), and those of the empty prompt for each source scene."""
    scenes, _ = sources_of(edits)
    pictures = {scene: pipeline.image_processor.resize(draw(scene), CONDITION_SIDE, CONDITION_SIDE) for scene in scenes}
    embeds, lengths = _encode(pipeline, [(edit.instruction, pictures[edit.source]) for edit in edits])
    empty, empty_lengths = _encode(pipeline, [(EMPTY_PROMPT, pictures[scene]) for scene in scenes])
    return {"embeds": embeds, "lengths": lengths, "empty": empty, "empty_lengths": empty_lengths}


def _encode(
    pipeline: QwenImageEditPlusPipeline, prompts: list[tuple[str, Image.Image]]
) -> tuple[torch.Tensor, torch.Tensor]:
    embeds = torch.zeros(len(prompts), TEXT_LENGTH, 128, dtype=torch.float16)
    lengths = torch.zeros(len(prompts), dtype=torch.long)
    for row, (text, picture) in enumerate(prompts):
        states, _ = pipeline.encode_prompt(text, image=[picture])  # (1, T, 128)
        lengths[row] = states.shape[1]
        embeds[row, : states.shape[1]] = states[0].half()
    return embeds, lengths


@torch.no_grad()
def encode_latents(pipeline: QwenImageEditPlusPipeline, edits: list[Edit]) -> dict[str, torch.Tensor]:
    """Packed, normalised latents: sources (S, 64, 64), targets (N, 64, 64), float16, and source_index (N,)."""
    scenes, index = sources_of(edits)
    config = pipeline.vae.config
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1)
    deviation = torch.tensor(config.latents_std).view(1, -1, 1, 1)
    plane = to_plane(copy.deepcopy(pipeline.vae))  # a copy: the pipeline itself stays stock

    def encode(pictures: list[Image.Image]) -> torch.Tensor:
        packed = []
        for start in range(0, len(pictures), 25):
            latents = encode_mean(plane, to_tensor(pictures[start : start + 25]))
            latents = (latents - mean) / deviation
            packed.append(pipeline._pack_latents(latents, len(latents), 16, 16, 16).half())
        return torch.cat(packed)

    return {
        "sources": encode([draw(scene) for scene in scenes]),
        "targets": encode([draw(edit.target) for edit in edits]),
        "source_index": index,
    }
