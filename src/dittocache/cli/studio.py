"""`dittocache studio`: the web UI on this machine."""

from __future__ import annotations

import threading
import webbrowser
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dittocache.cli.shared import note, say
from dittocache.errors import ConfigError

Roots = Annotated[list[Path] | None, Parameter(name="--root", negative="", show_default=False)]
Hosts = Annotated[list[str] | None, Parameter(name="--allow-host", negative="", show_default=False)]


def studio(
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    root: Roots = None,
    allow_host: Hosts = None,
    browser: bool = True,
) -> None:
    """Open the Studio: see the data, check the model, fill the cache, train, make pictures, compare, in the browser.

    Runs are processes of their own: they go on when the tab is closed, and when the Studio ends.

    Parameters
    ----------
    host
        Address to listen on. Any other than this machine's own (127.0.0.1) asks visitors for the token that is shown.
    port
        Port to listen on.
    root
        Folder that the Studio may read and write; may be given several times. Relative paths start from the first. The
        working directory when none is given.
    allow_host
        Further name that browsers reach it by, such as that of a proxy; may be given several times.
    browser
        Open a browser.
    """
    try:
        import nicegui  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the Studio needs NiceGUI, which is not there ({error}): pip install 'dittocache[studio]'"
        ) from error
    from dittocache.studio.access import access_for
    from dittocache.studio.app import run
    from dittocache.studio.roots import Roots as StudioRoots
    from dittocache.studio.state import Studio

    folders = root or [Path.cwd()]
    problems = [f"--root: {folder} is not a folder" for folder in folders if not folder.is_dir()]
    if problems:
        raise ConfigError("the Studio cannot start", problems)
    access = access_for(host, port, allow_host or ())

    def ready() -> None:
        say(f"Studio: {access.url}")
        note("Ctrl-C ends the Studio; runs that it started go on")
        if browser:
            threading.Timer(1.0, webbrowser.open, [access.url]).start()

    run(Studio(StudioRoots(folders), access), ready)
