"""Every test runs offline, on one thread per worker, and leaves the user's profiles alone."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DITTOCACHE_PROFILES"] = tempfile.mkdtemp(prefix="dittocache-test-profiles-")
