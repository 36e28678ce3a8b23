"""Makes `sample_report` importable, whatever way pytest imports test modules."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from sample_report import sample_report  # noqa: E402

from dittocache.quality.report_data import Report  # noqa: E402


@pytest.fixture(scope="session")
def report() -> Report:
    """A report with every section; immutable, so one serves all tests."""
    return sample_report()
