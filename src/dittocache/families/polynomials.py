"""Rescaling polynomials that others have published, with the distances that each was fitted on.

Coefficients belong to a checkpoint: a fit for Qwen-Image is worse than none on Qwen-Image-2512 (R² -0.35). Where a
source names no range, the one given here ends where the polynomial stops rising: beyond it a larger change would count
as a smaller one. Choose one by hand with `TeaCacheConfig(coefficients=PUBLISHED["qwen-image-2512"].coefficients)`; its
range comes with it. `dittocache calibrate` fits one to a checkpoint of your own.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dittocache.families.transformer_side import Polynomial

PLAIN = Polynomial((1.0, 0.0), source="distances as they are")

_MLX = "mlx-teacache 0.14.1"

PUBLISHED: Mapping[str, Polynomial] = MappingProxyType(
    {
        "qwen-image-spec": Polynomial(
            coefficients=(-4.5e02, 2.8e02, -4.5e01, 3.2e00, -2.0e-02),
            # Tuned by hand. It rises up to here, falls beyond and is negative from 0.426 on: it would skip for ever.
            fitted_range=(0.0, 0.33),
            source="vLLM-Omni's default for QwenImagePipeline",
            threshold=0.2,
        ),
        "qwen-image": Polynomial(
            coefficients=(-12.954226906135869, 8.883805167578382, -0.9363839862290331, 1.4538816050570036, 0.0),
            fitted_range=(0.04675976472922664, 0.587799896108221),
            source=f"{_MLX}, Qwen/Qwen-Image, 768 px, 50 steps, R² .849, held out .845",
            threshold=0.30,
        ),
        "qwen-image-2512": Polynomial(
            coefficients=(-13.200421839759947, 4.851407025105924, 2.4891133197469846, 0.2453630032662089, 0.0),
            fitted_range=(0.08094493952514002, 0.4705715918534816),
            source=f"{_MLX}, Qwen/Qwen-Image-2512, 768 px, 50 steps, R² .818, held out .785",
            threshold=0.25,
        ),
        "flux": Polynomial(
            coefficients=(498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
            source="TeaCache's authors, for FLUX.1",
        ),
        "flux-kontext": Polynomial(
            coefficients=(-1046.55119, 312.563399, -16.9500694, 0.410995971, 0.0374537863),
            fitted_range=(0.0, 0.18),
            source="a fork of ComfyUI-TeaCache, and diffusers' pull request 12652",
        ),
        "flux2-klein-base": Polynomial(
            coefficients=(-1841.022165607874, 848.4417137572868, -131.3554469956159, 8.179509586828413, 0.0),
            fitted_range=(0.028261402621865273, 0.21984468400478363),
            source=f"{_MLX}, FLUX.2-klein-base-4B, 512 px, 25 steps, R² .106",
            threshold=0.17,
        ),
        "z-image": Polynomial(
            coefficients=(-898.9907628349583, 367.7086118008557, -45.41511572598643, 3.95114319842774, 0.0),
            fitted_range=(0.027887196237753466, 0.25914120883567665),
            source=f"{_MLX}, Z-Image base, 512 px, 50 steps, R² .400, held out .179",
            threshold=0.12,
            signal="residual of the first main block",  # no step cache of this package measures it
        ),
    }
)


def range_of(coefficients: tuple[float, ...]) -> tuple[float, float] | None:
    """The distances that published coefficients were fitted on; None for others."""
    return next((one.fitted_range for one in PUBLISHED.values() if one.coefficients == coefficients), None)
