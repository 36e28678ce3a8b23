"""LPIPS: the distance of two pictures as a network sees it (extra `lpips`), with weights from a local file.

Zhang, Isola, Efros, Shechtman, Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR
2018. The package brings its own small last layer; the network below it (AlexNet, 240 MB) is a file that the user has:
nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from dittocache.errors import ConfigError
from dittocache.quality.metrics import Picture, as_pair

ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


def lpips(a: Picture, b: Picture, weights: Path) -> float:
    """LPIPS (AlexNet, version 0.1) of two pictures: 0.0 for identical ones, larger the more they differ.

    Args:
        a, b: 8-bit pictures of one size, as for `psnr`.
        weights: torchvision's AlexNet as a file of weights (`alexnet-owt-7be5be79.pth`).

    Raises:
        ConfigError: the file is not there or holds other weights, or the package is not installed.
        DataError: the sizes differ, or the values are not 8-bit RGB.
    """
    first, second = (
        torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1  # (1, 3, H, W) in [-1, 1]
        for pixels in as_pair(a, b)
    )
    with torch.no_grad():
        return float(_network(weights)(first, second))


@lru_cache(maxsize=1)
def _network(weights: Path) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    if not weights.is_file():
        raise ConfigError(
            f"LPIPS needs the weights of torchvision's AlexNet, and there is no file {weights}; download {ALEXNET} and "
            "give its path"
        )
    try:
        import lpips as package  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ConfigError(f"LPIPS is not there ({error}); pip install 'dittocache[lpips]'") from error
    with contextlib.redirect_stdout(io.StringIO()):  # it greets
        network: Any = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
    known = torch.load(weights, map_location="cpu", weights_only=True)
    wanted = {name: f"features.{name.partition('.')[2]}" for name in network.net.state_dict()}  # "slice1.0.weight"
    missing = sorted(set(wanted.values()) - known.keys())
    if missing:
        raise ConfigError(f"{weights} holds no weights of torchvision's AlexNet: it lacks {', '.join(missing)}")
    network.net.load_state_dict({name: known[source] for name, source in wanted.items()})
    found: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = network.eval().requires_grad_(False)
    return found
