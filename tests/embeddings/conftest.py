from __future__ import annotations

from pathlib import Path

import pytest
from tests.embeddings.toy_family import Job, make_job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Six samples, not cached yet."""
    return make_job(tmp_path)
