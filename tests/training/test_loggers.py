"""wandb is started so that it neither asks a terminal nor needs a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dittocache.training.config import TrainConfig
from dittocache.training.loggers import may_reach_wandb, start_loggers


@pytest.fixture
def netrc(tmp_path: Path) -> Path:
    file = tmp_path / "netrc"
    file.write_text("machine api.wandb.ai login user password key\nmachine own.example login user password key\n")
    file.chmod(0o600)
    return file


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WANDB_MODE": "offline"}, True),
        ({"WANDB_API_KEY": "x"}, True),
        ({"WANDB_API_KEY": ""}, False),
        ({"NETRC": "nowhere"}, False),
        ({"NETRC": "logins"}, True),
        ({"NETRC": "logins", "WANDB_BASE_URL": "https://own.example/"}, True),
        ({"NETRC": "logins", "WANDB_BASE_URL": "https://other.example"}, False),
    ],
)
def test_wandb_is_online_where_it_is_told_so_or_has_a_login(
    variables: dict[str, str], expected: bool, netrc: Path
) -> None:
    files = {"logins": str(netrc), "nowhere": str(netrc.parent / "nothing")}
    variables = {"NETRC": files["nowhere"]} | {name: files.get(value, value) for name, value in variables.items()}
    assert may_reach_wandb(variables) is expected


class Trackers:
    """Notes what an accelerator is asked to start."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def init_trackers(self, name: str, config: dict[str, Any], init_kwargs: dict[str, Any]) -> None:
        self.calls.append((name, config, init_kwargs))


def test_without_a_login_it_stays_offline_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "nothing"))
    notices: list[str] = []
    trackers = Trackers()
    start_loggers(trackers, TrainConfig(), "run", tmp_path, notices.append)
    assert not trackers.calls and not notices
    start_loggers(trackers, TrainConfig(log_with=["wandb"], betas=(0.9, 0.99)), "run", tmp_path, notices.append)
    [(name, settings, options)] = trackers.calls
    assert (name, options["wandb"]["mode"], options["wandb"]["dir"]) == ("run", "offline", str(tmp_path))
    assert settings["betas"] == "[0.9, 0.99]" and settings["rank"] == 16
    assert len(notices) == 1 and "wandb sync" in notices[0]
