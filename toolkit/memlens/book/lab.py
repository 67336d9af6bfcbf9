"""How JupyterLab is started, by `memlens lab` and by the browser test: on loopback, asking nothing of the network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["OFFLINE", "command"]

OFFLINE = (
    f"--LabApp.app_settings_dir={Path(__file__).with_name('settings')}",  # so that no one is asked about news or updates
    "--LabApp.news_url=None",  # no news feed
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--LabApp.extension_manager=readonly",  # lists what is installed, asks no registry
    "--LabApp.collaborative=False",
)


def command(
    *, port: int = 8888, open_at: str = "notebooks/00-start-here.ipynb", browser: bool = True, token: str | None = None
) -> list[str]:
    """The command line of a JupyterLab that serves the current folder on 127.0.0.1.

    Args:
        port: the first port tried; the next free one is taken, but when `browser` is off this one or none.
        open_at: the file shown first, relative to the folder.
        browser: whether to open a browser window.
        token: fixed by a test; by default JupyterLab makes its own.
    """
    line = [sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", *OFFLINE]
    line.append(f"--LabApp.default_url=/lab/tree/{open_at}")
    if getattr(os, "geteuid", lambda: 1)() == 0:  # in a container; it listens on loopback only
        line.append("--allow-root")
    if not browser:
        line += ["--no-browser", "--ServerApp.port_retries=0"]
    if token is not None:
        line.append(f"--IdentityProvider.token={token}")
    return line
