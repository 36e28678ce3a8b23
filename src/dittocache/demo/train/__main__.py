"""Command line: `python -m dittocache.demo.train STAGE --minutes M --work-dir DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dittocache.demo.model import MODEL_DIR
from dittocache.demo.train import stages


def main() -> None:
    """Parse the arguments and run one stage or all of them."""
    parser = argparse.ArgumentParser(prog="python -m dittocache.demo.train", description=__doc__)
    parser.add_argument("stage", choices=[*stages.STAGES, "all"], help="what to run; `all` runs them in this order")
    parser.add_argument("--minutes", type=float, help="time budget of the stage; earlier, interrupted runs count")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/train-demo"), help="checkpoints, data and log")
    parser.add_argument("--model-dir", type=Path, default=MODEL_DIR, help="where the finished model is written")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--processes", type=int, default=2, help="CPU processes of a stage that can use several, a thread each"
    )
    parser.add_argument("--samples", type=int, default=16_000, help="edits to encode for training")
    parser.add_argument("--start", type=Path, help="folder of a LoRA that `exact_lora` goes on from")
    arguments = parser.parse_args()
    names = list(stages.STAGES) if arguments.stage == "all" else [arguments.stage]
    for name in names:
        stages.STAGES[name](stages.Options(**{k: v for k, v in vars(arguments).items() if k != "stage"}))


if __name__ == "__main__":
    main()
