"""The stages by name, and the processes that `encode` and `dit` run in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from dittocache.demo.train.encode import CHUNK


@dataclass(frozen=True)
class Options:
    """What the command line chose; `minutes` is None for the stage's default."""

    work_dir: Path
    model_dir: Path
    minutes: float | None
    device: str
    processes: int
    samples: int
    start: Path | None = None


def run_tokenizer(options: Options) -> None:
    """Train the tokenizer and write the model folder's frame."""
    from dittocache.demo.train.assemble import save_frame
    from dittocache.demo.train.tokenizer import train_tokenizer

    save_frame(options.model_dir, train_tokenizer(options.work_dir / "tokenizer"))


def run_vae(options: Options) -> None:
    """Train the VAE."""
    from dittocache.demo.train.vae import train_vae

    torch.set_num_threads(1)
    train_vae(options.work_dir, options.model_dir, options.minutes or 14.0, options.device)


def run_polish(options: Options) -> None:
    """Train the VAE's decoder a little longer on what is rare."""
    from dittocache.demo.train.polish import polish_decoder

    torch.set_num_threads(1)
    polish_decoder(options.work_dir, options.model_dir, options.minutes or 5.0)


def run_text(options: Options) -> None:
    """Train the text encoder."""
    from dittocache.demo.train.text import train_text

    torch.set_num_threads(1)
    train_text(options.work_dir, options.model_dir, options.minutes or 7.0, options.device)


def run_encode(options: Options) -> None:
    """Encode the data set in several processes."""
    _spawn(_encode_worker, options)


def run_dit(options: Options) -> None:
    """Train the transformer in several processes."""
    _spawn(_dit_worker, options)


def run_exact_lora(options: Options) -> None:
    """Train the LoRA with isolated references on the finished model in several processes."""
    _spawn(_exact_lora_worker, options)


def run_evaluate(options: Options) -> None:
    """Evaluate on the held-out edits."""
    from dittocache.demo.evaluate import evaluate

    evaluate(options.model_dir, options.work_dir / "evaluation")


def _spawn(worker: Callable[[int, Options], None], options: Options) -> None:
    # One thread a process: two OpenMP threads in one process were several times slower on shared cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29517")
    spawn(worker, args=(options,), nprocs=options.processes, join=True)  # type: ignore[no-untyped-call]


def _encode_worker(rank: int, options: Options) -> None:
    from dittocache.demo.train.encode import encode_chunks

    count = -(-options.samples // CHUNK)
    encode_chunks(options.work_dir, options.model_dir, count, rank, options.processes)


def _dit_worker(rank: int, options: Options) -> None:
    from dittocache.demo.train.dit import train_dit

    with _process_group(rank, options.processes):
        train_dit(options.work_dir, options.model_dir, options.minutes or 60.0, rank, options.processes)


def _exact_lora_worker(rank: int, options: Options) -> None:
    from dittocache.demo.train.exact_lora import train_exact_lora

    torch.set_num_threads(1)
    minutes = options.minutes or 60.0
    with _process_group(rank, options.processes):
        for _ in train_exact_lora(options.work_dir, options.model_dir, minutes, start=options.start, rank=rank):
            pass


@contextmanager
def _process_group(rank: int, world: int) -> Iterator[None]:
    """One gloo group of all processes, where there are several."""
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


STAGES: dict[str, Callable[[Options], None]] = {
    "tokenizer": run_tokenizer,
    "vae": run_vae,
    "polish": run_polish,
    "text": run_text,
    "encode": run_encode,
    "dit": run_dit,
    "exact_lora": run_exact_lora,
    "evaluate": run_evaluate,
}
