"""Makes curves.nc: byte-lm trained for 120 steps by each optimizer, three seeds.

python datasets/galore/make.py          # about three minutes on one core
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import xarray

from memlens.data import cards
from memlens.models.byte_lm import fit
from memlens.optim import Projected, projected_groups

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)


def galore(model, **options):
    return Projected(projected_groups(model, rank=24), lr=0.01, every=50, **options)


ARMS = {
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=3e-3),
    "Adam, lr 0.01": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "SGD, lr 0.3": lambda model: torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9),
    "GaLore, alpha 0.25": partial(galore, alpha=0.25),
    "GaLore, alpha 1": partial(galore, alpha=1.0),
    "GaLore, alpha 0.25, 8-bit": partial(galore, alpha=0.25, states="dyn8"),
}


def main() -> None:
    """Train every arm with every seed, write the curves and their hash."""
    torch.set_num_threads(1)
    fits = [[fit(arm, seed=seed) for seed in SEEDS] for arm in ARMS.values()]
    curves = np.array([[fitted.losses.numpy() for fitted in row] for row in fits], dtype=np.float32)
    held = np.array([[fitted.held_out for fitted in row] for row in fits], dtype=np.float32)
    loss = {"long_name": "training loss", "units": "nats/byte"}
    data = xarray.Dataset(
        {
            "loss": (("method", "seed", "step"), curves, loss),
            "held_out": (("method", "seed"), held, {**loss, "long_name": "held-out loss after training"}),
        },
        coords={
            "method": list(ARMS),
            "seed": list(SEEDS),
            "step": ("step", np.arange(1, curves.shape[-1] + 1), {"long_name": "step"}),
        },
    )
    data.to_netcdf(HERE / "curves.nc", engine="h5netcdf")
    (HERE / "curves.nc").chmod(0o644)
    cards.update("galore")


if __name__ == "__main__":
    main()
