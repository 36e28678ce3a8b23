"""The house rules that a glance at the tree can check."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "dittocache").rglob("*.py"))
FILES = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
ROOMS = sorted(path.parent for path in (ROOT / "src" / "dittocache").glob("*/__init__.py"))
SAYING_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc"}


def test_no_file_is_over_400_lines() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: lines for name, lines in long.items() if lines > 400}


def test_no_name_says_nothing() -> None:
    assert not [path for path in FILES if {path.stem, *path.parent.parts} & SAYING_NOTHING]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_says_what_it_is_for_and_nothing_else(room: Path) -> None:
    tree = ast.parse((room / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


def test_settings_can_be_read_without_torch() -> None:
    """`dittocache --help` and config errors must not wait for torch."""
    for path in SOURCES:
        if path.name == "config.py":
            imported = {
                alias.name.partition(".")[0]
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
            }
            assert not imported & {"torch", "diffusers", "transformers"}, path
