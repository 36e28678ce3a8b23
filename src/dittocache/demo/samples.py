"""Write the bundled samples of the new edit, which the demo job's LoRA learns: `python -m dittocache.demo.samples`."""

from __future__ import annotations

from pathlib import Path

from dittocache.demo.edits import Edit, new_edits
from dittocache.demo.model import SAMPLES_DIR

TRAIN_COUNT = 40
HELD_OUT_COUNT = 12


def write_samples(folder: Path = SAMPLES_DIR) -> None:
    """Draw `train/` (40 samples) and `heldout/` (12, of scenes never trained on) as PNG pictures with captions.

    `training_images/NAME.png` is the target, `training_images/NAME.txt` its instruction and
    `control_images/NAME.png` the source.
    """
    for split, edits in (
        ("train", new_edits(TRAIN_COUNT, held_out=False)),
        ("heldout", new_edits(HELD_OUT_COUNT, held_out=True)),
    ):
        for number, edit in enumerate(edits):
            _write_sample(folder / split, f"blueprint-{number:02d}", edit)


def _write_sample(folder: Path, name: str, edit: Edit) -> None:
    source, target = edit.images()
    for part, picture in (("training_images", target), ("control_images", source)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        picture.save(folder / part / f"{name}.png", optimize=True)
    (folder / "training_images" / f"{name}.txt").write_text(edit.instruction + "\n")


if __name__ == "__main__":
    write_samples()
