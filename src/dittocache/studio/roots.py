"""The folders that the Studio may read and write: nothing outside them is shown, listed or served."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dittocache.errors import AccessError


class Roots:
    """Folders that were chosen when the Studio was started.

    Args:
        folders: relative ones start from the working directory; links in them are followed once, here.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = tuple(dict.fromkeys(folder.expanduser().resolve() for folder in folders))

    def allowed(self, path: str | Path) -> Path:
        """The path, absolute and with every link followed; raises AccessError where that lies outside all folders.

        A file that does not exist yet is judged by where it would be made. What is returned must be what is opened.
        """
        try:
            real = Path(path).expanduser().resolve()
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle, no such home, a zero byte
            raise AccessError(f"the path {str(path)!r} cannot be followed ({error}); give another") from error
        if any(real.is_relative_to(folder) for folder in self.folders):
            return real
        where = "" if real == Path(path) else f", which leads to {str(real)!r},"
        folders = ", ".join(str(folder) for folder in self.folders) or "none"
        raise AccessError(
            f"{str(path)!r}{where} is outside the Studio's folders ({folders}); start it with --root FOLDER to add one"
        )

    def holds(self, path: str | Path) -> bool:
        """Whether `allowed` would allow it."""
        try:
            self.allowed(path)
        except AccessError:
            return False
        return True
