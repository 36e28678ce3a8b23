"""dittocache: compute once, reuse everywhere, around Qwen-Image-family diffusion transformers."""
__version__ = "0.1.0"
