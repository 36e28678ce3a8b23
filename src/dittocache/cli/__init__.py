"""The command line."""

from dittocache.cli.app import app, main, run

__all__ = ["app", "main", "run"]
