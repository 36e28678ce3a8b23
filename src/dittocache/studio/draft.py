"""The settings of the next run as far as they are given, kept on disk while they are being edited."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dittocache.config import RunConfig, check_config
from dittocache.settings import Settings


class Draft:
    """Settings by dotted name (`{"train.steps": 20}`), as typed: they are checked when they are used.

    Every change is written at once, so that a reload, another tab or another start of the Studio goes on with it. A
    file that cannot be read as such a mapping counts as an empty draft.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    @property
    def version(self) -> int:
        """Changes with every change of the draft; 0 where nothing was ever given."""
        try:
            return self.path.stat().st_mtime_ns
        except OSError:
            return 0

    @property
    def given(self) -> dict[str, Any]:
        """The settings that were given, by dotted name."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def set(self, name: str, value: Any) -> None:
        """Give one setting; None takes it away, so that its default counts."""
        self.update({name: value})

    def update(self, values: Mapping[str, Any]) -> None:
        """Give several settings; None takes one away."""
        with self._lock:
            settings = {**self.given, **values}
            self._write({name: value for name, value in settings.items() if value is not None})

    def replace(self, values: Mapping[str, Any]) -> None:
        """Forget what was given and give these settings."""
        with self._lock:
            self._write({name: value for name, value in values.items() if value is not None})

    def config(self, extra: Mapping[str, Any] | None = None) -> RunConfig:
        """The draft as settings that were checked, `extra` on top; raises ConfigError listing every problem."""
        return check_config({}, {**self.given, **(extra or {})})

    def _write(self, settings: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(self.path)


def given_settings(config: Settings) -> dict[str, Any]:
    """What a config says that it was given, as a draft holds it: JSON values by dotted name."""
    content = config.model_dump(mode="json")
    given: dict[str, Any] = {}
    for name in type(config).model_fields:
        if name not in config.model_fields_set:
            continue
        value = getattr(config, name)
        if isinstance(value, Settings):
            given |= {f"{name}.{inner}": one for inner, one in given_settings(value).items()}
        elif value is not None:
            given[name] = content[name]
    return given
