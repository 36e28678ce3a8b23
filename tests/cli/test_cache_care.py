"""`dittocache cache verify | pack | gc | clear | inspect`, and what they do to a store on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from dittocache.cli import app as cli
from dittocache.cli import cache_care
from dittocache.embeddings.recipe import recipe_key
from dittocache.embeddings.store import roots
from dittocache.embeddings.store.store import Store
from dittocache.events import Progress


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three records; a run names two of them."""
    store = Store(tmp_path / "cache")
    keys = []
    for number in range(3):
        recipe = {"artifact": "image_latents", "family": "toy", "encoder": None, "number": number}
        keys.append(recipe_key(recipe))
        store.write(keys[-1], torch.full((4, 8), float(number)), recipe)
    manifest = tmp_path / "runs" / "one" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    roots.register(store, manifest, keys[:2], saved=True)
    return store


def run(store: Store, *words: str) -> int:
    return cli.run(["cache", *words, "--cache-dir", str(store.root)])


def unused_key(store: Store) -> str:
    return recipe_key({"artifact": "image_latents", "family": "toy", "encoder": None, "number": 2})


def test_a_sound_store_verifies_also_when_it_is_packed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(store, "verify") == 0
    assert "3 records" in capsys.readouterr().out
    assert run(store, "pack") == 0
    assert "3 records" in capsys.readouterr().out
    assert not list((Path(store.root) / "objects").rglob("*.safetensors"))
    assert run(store, "verify", "--json") == 0
    assert json.loads(capsys.readouterr().out)["records"] == 3


def test_a_damaged_record_is_named_and_ends_with_exit_code_1(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    [path] = (Path(store.root) / "objects").rglob(f"{unused_key(store)}.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run(store, "verify") == 1
    assert unused_key(store) in capsys.readouterr().out
    assert unused_key(store) not in store


def test_gc_shows_and_removes_nothing_until_it_is_told_to(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(store, "gc", "--min-age-hours", "0") == 0
    text = capsys.readouterr().out
    assert "1 records" in text and "add --yes" in text
    assert len(list(store.keys())) == 3
    assert run(store, "gc", "--min-age-hours", "0", "--json") == 0
    json.loads(capsys.readouterr().out)
    assert len(list(store.keys())) == 3
    assert run(store, "gc", "--min-age-hours", "0", "--yes") == 0
    assert sorted(store.keys()) and unused_key(store) not in store and len(list(store.keys())) == 2


def test_gc_leaves_young_records_alone(store: Store) -> None:
    assert run(store, "gc", "--yes") == 0
    assert len(list(store.keys())) == 3
    assert run(store, "gc", "--min-age-hours", "-1", "--yes") == 2


@pytest.mark.parametrize(("answer", "left"), [(True, 2), (False, 3)])
def test_gc_asks_in_a_terminal(store: Store, answer: bool, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr(cache_care.Confirm, "ask", lambda question, default: answer)
    assert run(store, "gc", "--min-age-hours", "0") == 0
    assert len(list(store.keys())) == left


def test_clear_removes_the_store_and_no_foreign_file(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = Path(store.root) / "notes.txt"
    foreign.write_text("mine")
    assert run(store, "clear") == 0
    text = capsys.readouterr().out
    assert "runs/one/manifest.json" in text and "notes.txt" in text
    assert len(list(store.keys())) == 3
    assert run(store, "clear", "--yes") == 0
    assert list(Store(Path(store.root)).keys()) == []
    assert foreign.read_text() == "mine"


def test_inspect_tells_a_record_and_the_whole(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(store, "inspect", unused_key(store)) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["artifact"], found["shape"], found["recipe"]["number"]) == ("image_latents", [4, 8], 2)
    assert found["used_by"] == []
    assert run(store, "inspect") == 0
    assert "image_latents" in capsys.readouterr().out
    assert run(store, "inspect", "nonsense") == 1
    assert "neither a key" in capsys.readouterr().err


def test_the_store_is_given_once_and_must_be_there(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump({"model": {"path": "x"}, "data": {"path": "y"}, "cache": {"cache_dir": str(store.root)}})
    )
    assert cli.run(["cache", "verify"]) == 2
    assert run(store, "verify", "--config", str(config)) == 2
    assert "either --cache-dir" in capsys.readouterr().err
    assert cli.run(["cache", "verify", "--config", str(config)]) == 0
    assert cli.run(["cache", "verify", "--cache-dir", str(tmp_path / "none")]) == 2
    assert "there is no cache" in capsys.readouterr().err


def test_a_misspelt_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["cache", "verfy"]) == 2
    assert "did you mean 'verify'" in capsys.readouterr().err


def test_progress_never_stands_among_json(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Progress.__init__, "__defaults__", (0.0,))  # report every record
    monkeypatch.setattr("dittocache.jobs.terminal.SECONDS_A_LINE", -1.0)  # each on a line of its own
    assert run(store, "verify", "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["records"] == 3
    assert "1 of 3" in printed.err
