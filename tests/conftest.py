"""Every test runs offline, on one thread per worker, leaves the user's profiles and queue alone, and is never timed."""

import os
import tempfile

import hypothesis

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DITTOCACHE_PROFILES"] = tempfile.mkdtemp(prefix="dittocache-test-profiles-")
os.environ["DITTOCACHE_QUEUE"] = tempfile.mkdtemp(prefix="dittocache-test-queue-")

# The same examples in every run, however busy the machine is.
hypothesis.settings.register_profile(
    "dittocache", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("dittocache")
