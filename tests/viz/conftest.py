"""Labelled data as a notebook would have them, and a figures folder of one's own."""

import numpy as np
import pytest
import xarray as xr


@pytest.fixture
def figures(tmp_path, monkeypatch):
    folder = tmp_path / "figures"
    monkeypatch.setenv("MEMLENS_FIGURES", str(folder))
    monkeypatch.delenv("MEMLENS_REFRESH", raising=False)
    return folder


@pytest.fixture
def data() -> xr.Dataset:
    """Three methods over four budgets, an attention map, bytes by part."""
    draw = np.random.default_rng(0)
    weight = np.tril(draw.random((6, 6)))
    budget = ("budget", [16, 32, 64, 128], {"long_name": "budget", "units": "tokens"})
    loss = np.array([[0.8, 0.4, 0.2, 0.1], [0.6, 0.3, 0.25, 0.2], [0.05, 0.05, 0.05, 0.05]])
    nats = {"long_name": "divergence", "units": "nats"}
    return xr.Dataset(
        {
            "loss": (("method", "budget"), loss, nats),
            "sd": (("method", "budget"), 0.1 * loss),
            "runs": (("method", "budget", "seed"), loss[..., None] + np.array([-0.01, 0.0, 0.01]), nats),
            "held": (("method", "budget"), loss[::-1] * 100, {"long_name": "memory held", "units": "MiB"}),
            "weight": (("query", "key"), weight, {"long_name": "attention weight"}),
            "maps": (("head", "query", "key"), np.stack([weight, 2 * weight])),
            "parts": (("method", "part"), draw.random((3, 2)), {"units": "MiB"}),
        },
        coords={"method": ["h2o", "random", "full"], "budget": budget, "part": ["payload", "scales"], "head": [3, 5]},
    )
