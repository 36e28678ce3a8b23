"""Every fragment of YAML, TOML and tables in the docs, and every folder that they draw, is read by the library."""

from __future__ import annotations

import csv
import io
import json
import re
import tomllib
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from tests.docs.test_commands import ROOT, blocks

from dittocache.config import check_config, load_config
from dittocache.data.config import DataConfig
from dittocache.data.loading import load_samples

LEAST = {"model": {"path": "bundled"}, "data": {"path": "data/my-edit"}}


def fragments(language: str) -> list[Any]:
    return [pytest.param(body, id=f"{page}: {number}") for number, (page, body) in enumerate(blocks(language))]


def test_there_are_fragments_of_every_kind() -> None:
    assert all(blocks(language) for language in ("yaml", "toml", "csv", "jsonl", "files"))


@pytest.mark.parametrize("body", fragments("yaml"))
def test_yaml_holds_settings_that_exist(body: str) -> None:
    content = yaml.safe_load(body)
    sections: dict[str, Any] = {**LEAST, **content}
    if "sets" in content.get("data", {}):
        sections["data"] = content["data"]
    elif "data" in content:
        sections["data"] = {**LEAST["data"], **content["data"]}
    config = check_config(sections, origin="the docs")
    assert config.data.every_set


@pytest.mark.parametrize("body", fragments("files"))
def test_folders_that_are_drawn_can_be_trained_on(body: str, tmp_path: Path) -> None:
    names = [line.split()[0] for line in body.splitlines() if line.strip()]
    for name in names:
        _make(tmp_path / name)
    samples = load_samples(DataConfig(path=tmp_path, resolution=64), 16, None)
    targets = [name for name in names if name.endswith(".txt")]
    assert len(samples) == len(targets)
    used = {path for sample in samples for path in (sample.target, *sample.controls, sample.mask) if path is not None}
    assert used == {tmp_path / name for name in names if not name.endswith(".txt")}, "every picture has a part"


@pytest.mark.parametrize("body", fragments("csv"))
def test_csv_can_be_trained_on(body: str, tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(body)))
    named = [value for row in rows for name, value in row.items() if name.startswith("path") and value]
    _check_table(tmp_path / "table.csv", body, named, len(rows))


@pytest.mark.parametrize("body", fragments("jsonl"))
def test_jsonl_can_be_trained_on(body: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in body.splitlines()]
    values = [value for row in rows for one in row.values() for value in (one if isinstance(one, list) else [one])]
    _check_table(tmp_path / "table.jsonl", body, [value for value in values if value.endswith(".png")], len(rows))


def _check_table(table: Path, body: str, named: list[str], rows: int) -> None:
    for name in named:
        _make(table.parent / name)
    table.write_text(body)
    samples = load_samples(DataConfig(path=table, resolution=64), 16, None)
    assert len(samples) == rows
    assert sum(1 + len(one.controls) + (one.mask is not None) for one in samples) == len(named)


@pytest.mark.parametrize("body", fragments("toml"))
def test_toml_can_be_trained_on(body: str, tmp_path: Path) -> None:
    for dataset in tomllib.loads(body)["datasets"]:
        if "image_directory" in dataset:
            _make(tmp_path / dataset["image_directory"] / "x.png")
            _make(tmp_path / dataset["image_directory"] / "x.txt")
        if "control_directory" in dataset:
            _make(tmp_path / dataset["control_directory"] / "x_0.png")
            _make(tmp_path / dataset["control_directory"] / "x_1.png")
        if "image_jsonl_file" in dataset:
            _make(tmp_path / "y.png")
            (tmp_path / dataset["image_jsonl_file"]).write_text('{"image_path": "y.png", "caption": "a wall"}\n')
    (tmp_path / "sets.toml").write_text(body)
    samples = load_samples(DataConfig(path=tmp_path / "sets.toml"), 16, None)
    assert [len(sample.controls) for sample in samples] == [2, 0]
    assert [sample.repeats for sample in samples] == [2, 1]


def test_the_table_of_cards_says_what_the_configs_say() -> None:
    page = (ROOT / "docs/training.md").read_text()
    configs = sorted((ROOT / "configs").glob("*-*gb.yaml"))
    assert configs
    for model, files in groupby(configs, lambda path: path.stem.rpartition("-")[0]):
        assert f"| `{model}` | {' | '.join(map(_card, files))} |" in page


def _card(path: Path) -> str:
    planned = re.search(r"about (\d+) GB", path.read_text())
    assert planned is not None
    train = load_config(path).train
    words = [f"{planned[1]} GB", f"batch {train.batch_size}"]
    words += [] if train.base_quantization == "none" else [train.base_quantization]
    return ", ".join([*words, *(["offloaded"] if train.offload == "group" else [])])


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".txt":
        path.write_text("make the wall green\n")
    else:
        Image.new("RGB", (64, 64), "gray").save(path)
