"""`dittocache cache export` and `import`: out of one store and into another one, on a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tests.jobs.conftest import draw_set

from dittocache.cli import app as cli
from dittocache.demo.tiny import save_tiny


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of two samples, cached."""
    tmp_path = tmp_path_factory.mktemp("run")
    settings = {
        "output_dir": str(tmp_path / "runs"),
        "model": {
            "path": str(save_tiny(tmp_path / "model", "qwen-image-edit-plus")),
            "dtype": "float32",
            "device": "cpu",
        },
        "data": {"path": str(draw_set(tmp_path / "data", 2)), "resolution": 64, "condition_resolution": 32},
        "cache": {"cache_dir": str(tmp_path / "cache"), "num_workers": 0},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert cli.run(["cache", "--config", str(file)]) == 0
    return str(file)


@pytest.mark.timeout(300)
def test_out_of_one_store_and_into_another(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert cli.run(["cache", "export", out, "--config", config, "--dry-run"]) == 0
    assert not Path(out).exists()
    assert cli.run(["cache", "export", out, "--config", config]) == 0
    assert list(Path(out).glob("prompt_embeds/*.pt")) and list(Path(out).glob("metadata/*.json"))

    elsewhere = ["--cache.cache_dir", str(tmp_path / "second"), "--name", "second"]
    capsys.readouterr()
    assert cli.run(["cache", "import", "qflux", out, "--config", config, *elsewhere, "--dry-run"]) == 0
    assert "NOT VERIFIED" in capsys.readouterr().out
    assert cli.run(["cache", "import", "qflux", out, "--config", config, *elsewhere, "--check", "1"]) == 0
    capsys.readouterr()
    assert cli.run(["cache", "plan", "--config", config, *elsewhere, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["misses"] == 0


@pytest.mark.timeout(300)
def test_a_folder_that_is_no_cache_is_refused(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["cache", "import", "qflux", str(tmp_path / "none"), "--config", config]) == 1
    assert "metadata" in capsys.readouterr().err
