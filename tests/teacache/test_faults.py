"""The table of faults in docs/step-cache-faults.md names tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "step-cache-faults.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_fault_names_tests_that_exist() -> None:
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if re.match(r"\| (\d+|·) \|", line)]
    numbers = [int(row.split("|")[1]) for row in rows if "·" not in row.split("|")[1]]
    assert numbers == list(range(1, 16))
    missing = []
    for row in rows:
        named = NAMED.findall(row)
        assert named, f"a fault without a test: {row}"
        missing += [f"{path}::{name}" for path, name in named if name not in _functions(ROOT / path)]
    assert not missing


def _functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
