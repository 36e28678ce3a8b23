from __future__ import annotations

from pathlib import Path

import pytest
from tests.embeddings.toy_family import Job, make_job

from dittocache.embeddings.encoding import session


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Six samples, not cached yet; the toy's encoders need no garbage collection of the whole process."""
    monkeypatch.setattr(session, "free_memory", lambda pipe=None: None)
    return make_job(tmp_path)
