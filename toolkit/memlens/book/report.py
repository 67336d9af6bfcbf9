"""What a bug report needs: versions, device, and the form that `auto` picks."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from memlens import backend

__all__ = ["report"]

PACKAGES = (
    "memlens",
    "torch",
    "triton",
    "transformers",
    "numpy",
    "xarray",
    "hvplot",
    "bokeh",
    "ipywidgets",
    "jupyterlab",
    "nbval",
)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def report() -> str:
    """Lines of `name: value`."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    choice = backend.explain("attend", torch.empty(1, device="cuda" if device != "cpu" else "cpu"))
    lines = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        **{name: _version(name) for name in PACKAGES},
        "device": device,
        "auto picks": f"{choice.form} ({choice.reason})",
        "triton": f"{_version('triton')}; " + (backend.triton_problem(torch.empty(1)) or "runs here"),
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items())
