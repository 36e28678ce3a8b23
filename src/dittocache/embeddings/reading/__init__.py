"""Cached samples on their way into a training step."""
