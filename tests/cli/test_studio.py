"""`dittocache studio`: what it says where it cannot start."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from dittocache.cli.app import run
from dittocache.errors import ConfigError
from dittocache.studio import app


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_root_that_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["studio", "--root", str(tmp_path / "none"), "--no-browser"]) == 2
    assert f"--root: {tmp_path / 'none'} is not a folder" in _said(capsys)


def test_without_nicegui(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nicegui", None)
    assert run(["studio", "--root", str(tmp_path), "--no-browser"]) == 2
    assert "pip install 'dittocache[studio]'" in _said(capsys)


def _bound(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(socket.socket, "bind", refuse)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("EADDRINUSE", "port 8080 of 127.0.0.1 is in use.*--port 8081"),
        ("EACCES", "port 8080 may not be used by this user"),
        ("EADDRNOTAVAIL", "'127.0.0.1' is no address of this machine"),
        ("EIO", "cannot listen on 127.0.0.1:8080"),
    ],
)
@pytest.mark.enable_socket
def test_a_port_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, error: str, words: str) -> None:
    import errno

    _bound(monkeypatch, getattr(errno, error))
    with pytest.raises(ConfigError, match=words):
        app.listen("127.0.0.1", 8080)


@pytest.mark.enable_socket
def test_a_port_in_use_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with app.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert run(["studio", "--root", str(tmp_path), "--port", str(port), "--no-browser"]) == 2
    assert f"port {port} of 127.0.0.1 is in use" in _said(capsys)


@pytest.mark.enable_socket
def test_a_name_that_is_no_address() -> None:
    with pytest.raises(ConfigError, match="is no address of this machine"):
        app.listen("no such host", 8080)
