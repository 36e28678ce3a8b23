"""No path outside the Studio's folders is followed, however it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from dittocache.errors import AccessError
from dittocache.studio.roots import Roots


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(b"a")
    (tmp_path / "data-secret").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    return Roots([tmp_path / "data"])


def test_paths_inside_are_returned_absolute(roots: Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert roots.allowed("data/a.png") == (tmp_path / "data" / "a.png").resolve()
    assert roots.allowed(tmp_path / "data") == (tmp_path / "data").resolve()
    assert roots.allowed(tmp_path / "data" / "new" / "folder") == (tmp_path / "data" / "new" / "folder").resolve()


@pytest.mark.parametrize(
    "path", ["data/../secret.txt", "secret.txt", "data-secret/x", "/etc/passwd", "data/new/../../secret.txt", ".", ""]
)
def test_paths_outside_are_refused(roots: Roots, tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AccessError, match="--root FOLDER"):
        roots.allowed(path)
    assert not roots.holds(path)


def test_links_are_followed_before_they_are_judged(roots: Roots, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "out.txt").symlink_to(tmp_path / "secret.txt")
    (data / "up").symlink_to(tmp_path, target_is_directory=True)
    (data / "inside.png").symlink_to(data / "a.png")
    for path in (data / "out.txt", data / "up" / "secret.txt", data / "up" / "not-there-yet"):
        with pytest.raises(AccessError, match="which leads to"):
            roots.allowed(path)
    assert roots.allowed(data / "inside.png") == (data / "a.png").resolve()


def test_a_root_may_be_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    roots = Roots([tmp_path / "link"])
    assert roots.allowed(tmp_path / "link" / "x") == (tmp_path / "real" / "x").resolve()


def test_paths_that_lead_nowhere_are_refused_with_their_cause(roots: Roots, tmp_path: Path) -> None:
    for path in ("data/\0.png", "~no-such-user-here/x"):
        with pytest.raises(AccessError, match="cannot be followed"):
            roots.allowed(path)
    circle = tmp_path / "data" / "circle"
    circle.symlink_to(circle)
    assert not roots.holds(circle / "x") or not (circle / "x").exists()


def test_no_folders_allow_nothing(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="none"):
        Roots([]).allowed(tmp_path)
