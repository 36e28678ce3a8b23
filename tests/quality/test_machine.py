"""The description of the machine, where the system tells and where it does not."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dittocache.quality import machine


def test_the_cpu_is_read_from_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel\t\t: 17\nmodel name\t: Example  CPU 7000\nprocessor : 1\nmodel name : Other\n"
    )
    assert machine.cpu_model(cpuinfo) == "Example CPU 7000"


def test_without_cpuinfo_the_platform_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert machine.cpu_model(tmp_path / "missing") == "arm"
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert machine.cpu_model(tmp_path / "missing") == "arm64"
    (tmp_path / "nameless").write_text("BogoMIPS : 50\n")
    assert machine.cpu_model(tmp_path / "nameless") == "arm64"


def test_usable_cores_are_those_of_this_process() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert machine.usable_cores() == len(before)


def test_versions_name_python_first_and_leave_out_what_is_not_installed() -> None:
    found = machine.versions(("torch", "no-such-distribution"))
    assert found == (("python", platform.python_version()), ("torch", torch.__version__))


def test_accelerators_are_named_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(name="Example GPU", total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    assert machine.accelerators() == ("Example GPU, 24 GiB", "Example GPU, 24 GiB")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.accelerators() == ()


def test_this_machine_is_described() -> None:
    found = machine.describe_machine()
    assert found.cpu and found.cores >= 1
    assert found.memory_bytes is not None and found.memory_bytes > 2**28
    assert {"python", "torch", "diffusers", "transformers"} <= {name for name, _ in found.versions}
