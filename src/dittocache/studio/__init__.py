"""The web UI (see docs/architecture.md): pages only."""
