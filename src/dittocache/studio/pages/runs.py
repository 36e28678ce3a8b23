"""Page *Runs*."""

from __future__ import annotations

from dittocache.studio.layout import heading
from dittocache.studio.state import Studio


def page(studio: Studio) -> None:
    """Build the page."""
    heading("Runs")
