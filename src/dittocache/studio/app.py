"""The application: pages and endpoints, behind the checks of `safety`, served to the browser."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nicegui
import uvicorn
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from nicegui import ui

from dittocache.errors import ConfigError
from dittocache.studio import report_files, thumbnails
from dittocache.studio.layout import frame
from dittocache.studio.pages import cache, data, generate, model, reports, runs, train
from dittocache.studio.safety import SafetyMiddleware
from dittocache.studio.state import Studio
from dittocache.studio.training import serve_line

ASSETS = Path(__file__).parent / "assets"

PAGES: dict[str, Callable[[Studio], None]] = {
    "/data": data.page,
    "/model": model.page,
    "/cache": cache.page,
    "/train": train.page,
    "/generate": generate.page,
    "/reports": reports.page,
    "/runs": runs.page,
}


def create_app(studio: Studio) -> FastAPI:
    """The Studio as an application of its own: nothing is served that `SafetyMiddleware` has not let through."""
    application = FastAPI(openapi_url=None)
    register(studio)
    nicegui.app.on_startup(studio.worker.warm)
    nicegui.app.on_startup(serve_line)
    nicegui.app.on_shutdown(studio.worker.close)
    ui.run_with(application, title="dittocache Studio", dark=None, tailwind=False, show_welcome_message=False)
    application.add_middleware(SafetyMiddleware, access=studio.access)
    return application


def register(studio: Studio) -> None:
    """Add every page and endpoint to NiceGUI's application, of which there is one in a process."""
    server = nicegui.app
    server.add_static_files("/assets", ASSETS)
    for sheet in ("studio.css", "results.css"):
        ui.add_head_html(f'<link rel="stylesheet" href="/assets/{sheet}">', shared=True)
    server.get("/")(lambda: RedirectResponse("/data"))
    for path, answer in {**thumbnails.endpoints(studio), **report_files.endpoints(studio)}.items():
        server.get(path)(answer)
    for path, build in PAGES.items():
        ui.page(path)(partial(_framed, studio, path, build))


def run(studio: Studio, ready: Callable[[], None] = lambda: None) -> None:
    """Serve the Studio until Ctrl-C, with the first root as working directory.

    Args:
        ready: called once it listens.

    Raises ConfigError where it cannot listen: the port is in use or not allowed, the address is none of this machine's.
    """
    with listen(studio.access.host, studio.access.port) as listening:
        os.chdir(studio.base)
        server = uvicorn.Server(uvicorn.Config(create_app(studio), log_level="warning"))
        ready()
        server.run(sockets=[listening])


def _framed(studio: Studio, path: str, build: Callable[[Studio], None]) -> None:
    with frame(studio, path):
        build(studio)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises ConfigError that says why it cannot and what to do."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host: {host!r} is no address of this machine ({error}); try 127.0.0.1") from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise ConfigError(_why_not(error, host, port)) from error
    return listening


def _why_not(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} of {host} is in use, perhaps by another Studio; open http://{host}:{port}/, end what listens "
            f"there, or give another one: --port {port + 1}"
        )
    if error.errno == errno.EACCES:
        return f"port {port} may not be used by this user; give one above 1023: --port 8080"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host: {host!r} is no address of this machine; try 127.0.0.1, or 0.0.0.0 for all of them"
    return f"cannot listen on {host}:{port} ({error.strerror or error}); give another --host or --port"
