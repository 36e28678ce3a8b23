"""LPIPS says what is missing; with the extra installed it is a distance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dittocache.errors import ConfigError
from dittocache.quality import metrics_lpips
from dittocache.quality.metrics_lpips import lpips


@pytest.fixture(autouse=True)
def no_network_of_another_test() -> None:
    metrics_lpips._network.cache_clear()


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def alexnet_weights(folder: Path) -> Path:
    """A file of AlexNet's shape with random values."""
    torch.manual_seed(0)
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    weights = {f"features.{layer}.weight": 0.05 * torch.randn(shape) for layer, shape in shapes.items()}
    weights |= {f"features.{layer}.bias": torch.zeros(shape[0]) for layer, shape in shapes.items()}
    torch.save(weights, folder / "alexnet.pth")
    return folder / "alexnet.pth"


def test_without_the_file_it_names_the_file_and_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*alexnet\.pth; download https://"):
        lpips(picture(0), picture(1), tmp_path / "alexnet.pth")


def test_without_the_package_it_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    with pytest.raises(ConfigError, match=r"pip install 'dittocache\[lpips\]'"):
        lpips(picture(0), picture(1), alexnet_weights(tmp_path))


def test_it_is_zero_for_equal_pictures_and_larger_for_others(tmp_path: Path) -> None:
    pytest.importorskip("lpips")
    weights = alexnet_weights(tmp_path)
    near = picture(0) // 2 + picture(1) // 2
    assert lpips(picture(0), picture(0), weights) == 0.0
    assert 0.0 < lpips(picture(0), near, weights) < lpips(picture(0), picture(2), weights)


def test_another_networks_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("lpips")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    with pytest.raises(ConfigError, match=r"it lacks features\.0\.bias"):
        lpips(picture(0), picture(1), tmp_path / "vgg.pth")
