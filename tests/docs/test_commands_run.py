"""The commands of README and docs are carried out, page by page, on a tiny checkpoint in place of the real one."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.docs.test_commands import PAGES, ROOT, commands
from tests.forked_stages import forked_stages

from dittocache import main
from dittocache.cli import app as cli
from dittocache.demo.tiny import save_tiny

__all__ = ["forked_stages"]

TESTED_ELSEWHERE = ("studio", "queue")  # they leave processes behind
OWN_DATA = Path("data/my-edit")  # the data set that the pages speak of


def page_commands() -> list[Any]:
    """(page, its dittocache commands in order)."""
    pages: dict[str, list[list[str]]] = {page.name: [] for page in PAGES}
    for parameter in commands():
        words = parameter.values[0]
        ours = words[0] == "dittocache" and words[1] not in TESTED_ELSEWHERE
        if ours or words[:3] == ["python", "-m", "dittocache.main"]:  # torchrun has tests of its own
            pages[str(parameter.id).split(":")[0]].append(words)
    return [pytest.param(found, id=page) for page, found in pages.items() if found]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the shipped configs, a tiny checkpoint, three samples and the picture that a page edits."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    save_tiny(tmp_path / "tiny", "qwen-image-edit-plus")
    rng = random.Random(0)
    for folder in ("training_images", "control_images"):
        (OWN_DATA / folder).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (64, 64), tuple(rng.randrange(256) for _ in range(3))).save(
                OWN_DATA / folder / f"{number}.png"
            )
            (OWN_DATA / "training_images" / f"{number}.txt").write_text(f"edit {number}")
    Image.new("RGB", (64, 64), "gray").save("room.png")
    return tmp_path


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("forked_stages")
@pytest.mark.parametrize("page", page_commands())
def test_every_command_of_a_page_is_carried_out(page: list[list[str]], workplace: Path) -> None:
    small = {
        "model.path": "tiny",
        "model.dtype": "float32",
        "model.device": "cpu",
        "data.path": str(OWN_DATA),
        "data.resolution": "64",
        "data.condition_resolution": "64",
        "held_out": "null",
        "cache.cache_dir": "cache",
        "cache.devices": "{}",
        "cache.num_workers": "0",
        "cache.workers": "1",
        "train.steps": "2",
        "train.processes": "1",
        "generate.num_inference_steps": "3",
        "calibrate.samples": "1",
        "calibrate.held_out_samples": "1",
        "tune.samples": "2",
        "tune.held_out_samples": "2",
    }
    overrides = [word for name, value in small.items() for word in (f"--{name}", value)]
    if any("qflux_cache" in words for words in page):
        elsewhere = [*overrides, "--cache.cache_dir", "before", "--name", "before"]
        assert cli.run(["cache", "--config", "configs/qwen-image-edit-plus-24gb.yaml", *elsewhere]) == 0
        exported = ["cache", "export", "qflux_cache", "--config", "configs/qwen-image-edit-plus-24gb.yaml", *elsewhere]
        assert cli.run(exported) == 0
    for words in page:
        run = cli.run if words[0] == "dittocache" else main.main
        arguments = words[1:] if words[0] == "dittocache" else words[3:]
        for option, place in (("--model", "tiny"), ("--data", str(OWN_DATA))):
            if option in arguments:
                arguments[arguments.index(option) + 1] = place
        assert run([*arguments, *overrides]) == 0, " ".join(words)
    did = {words[1] for words in page if words[0] == "dittocache"}
    runs = [path for path in (workplace / "runs").glob("*") if path.is_dir()]
    assert runs or did == {"plan"}
    if "qflux_cache" in str(page):
        assert list(workplace.glob("for_qflux/metadata/*.json")) and list(workplace.glob("per_sample/*.safetensors"))
    if "train" in did:
        assert list((workplace / "runs").glob("*/lora/pytorch_lora_weights.safetensors"))
        assert list((workplace / "cache").rglob("*.safetensors"))
    if "generate" in did:
        assert list((workplace / "runs").glob("*/samples/*.png"))
    if "report" in did:
        assert list((workplace / "runs").glob("*/report.html"))
