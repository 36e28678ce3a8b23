"""How tensorboard and wandb are started for a run."""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dittocache.training.config import TrainConfig

WANDB_SERVER = "https://api.wandb.ai"


def start_loggers(
    accelerator: Any, config: TrainConfig, name: str, folder: Path, notice: Callable[[str], None] = lambda text: None
) -> None:
    """Start `config.log_with` with the run's settings; nothing where it is empty.

    Args:
        name: of the run.
        folder: where wandb keeps its files.
        notice: told where wandb stays offline for want of a login.
    """
    if not config.log_with:
        return
    settings = config.model_dump(mode="json")
    flat = {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()}
    wandb: dict[str, Any] = {"name": name, "dir": str(folder)}
    if "wandb" in config.log_with and not may_reach_wandb(os.environ):
        wandb["mode"] = "offline"
        notice(
            f"wandb has no login here, so what it records stays in {folder / 'wandb'}: `wandb sync` uploads it; "
            "to have it sent at once, `wandb login` or set WANDB_MODE"
        )
    accelerator.init_trackers(name, config=flat, init_kwargs={"wandb": wandb})


def may_reach_wandb(environment: Mapping[str, str]) -> bool:
    """Whether wandb is told what to do (`WANDB_MODE`) or finds a login; without either it would ask a terminal."""
    if any(environment.get(name) for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    try:
        logins = netrc.netrc(environment.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return logins.authenticators(urlsplit(environment.get("WANDB_BASE_URL") or WANDB_SERVER).hostname or "") is not None
