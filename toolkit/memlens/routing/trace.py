"""Which experts a router chose, token by token: recorded from a mixture of experts, or made from a dense model.

`record` watches a model through forward hooks and changes nothing. With the routers of `moefy`, which cut a dense
feed-forward into experts, a dense model gives a trace too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memlens import check
from memlens.routing.gate import top_experts
from memlens.routing.oracle import OracleRouter, moefy

__all__ = [
    "OracleRouter", "RoutingTrace", "check_requests", "check_trace", "find_routers", "join", "moefy", "record", "reroute",
    "shipped",
]  # fmt: skip

KEEP = ("logits", "gate_in")


class RoutingTrace(NamedTuple):
    experts: Tensor  # (batch, token, layer, k) int64, by falling router score; ties go to the lower expert
    logits: Tensor | None  # (batch, token, layer, expert) raw router scores
    gate_in: Tensor | None  # (batch, token, layer, dim), the vector the router read
    num_experts: int
    top_k: int
    layers: tuple[int, ...]
    labels: tuple[str, ...] = ()  # one for each sample, e.g. its domain; empty where there is none

    def tokens(self, start: int | None = None, stop: int | None = None) -> RoutingTrace:
        """The trace of tokens start..stop-1 of every sample, e.g. `trace.tokens(4)` without attention sinks."""
        cut = slice(start, stop)
        kept = {name: None if (x := getattr(self, name)) is None else x[:, cut] for name in ("experts", *KEEP)}
        return self._replace(**kept)

    def to_xarray(self):
        """The trace as an xarray Dataset with dims sample, token, layer, choice, expert, dim and sample labels."""
        import xarray as xr

        dims = {
            "experts": ("sample", "token", "layer", "choice"),
            "logits": ("sample", "token", "layer", "expert"),
            "gate_in": ("sample", "token", "layer", "dim"),
        }
        tensors = {name: getattr(self, name) for name in dims}
        data = {name: (dims[name], x.cpu().numpy()) for name, x in tensors.items() if x is not None}
        out = xr.Dataset(data, {"layer": list(self.layers)}, {"num_experts": self.num_experts, "top_k": self.top_k})
        out["experts"].attrs = {"long_name": "chosen expert", "units": "index"}
        return out.assign_coords(dataset=("sample", list(self.labels))) if self.labels else out

    @classmethod
    def from_xarray(cls, data) -> RoutingTrace:
        """The inverse of `to_xarray`; expert ids may be stored as small integers."""
        tensors = {name: torch.as_tensor(data[name].values) if name in data else None for name in ("experts", *KEEP)}
        tensors["experts"] = tensors["experts"].long()
        labels = tuple(map(str, data["dataset"].values)) if "dataset" in data.coords else ()
        layers = tuple(int(layer) for layer in data["layer"].values)
        return cls(
            **tensors,
            num_experts=int(data.attrs["num_experts"]),
            top_k=int(data.attrs["top_k"]),
            layers=layers,
            labels=labels,
        )


def check_trace(op: str, trace: RoutingTrace) -> dict[str, int]:
    """Sizes of a trace after refusing wrong shapes, experts outside 0..num_experts-1 and repeats in one token."""
    sizes = check.shapes(op, experts=(trace.experts, "batch token layer k"))
    check_requests(op, trace.experts.flatten(0, -2)[None], trace.num_experts)
    if sizes["layer"] != len(trace.layers) or sizes["k"] != trace.top_k:
        check.fail(op, f"layers {trace.layers} and top_k={trace.top_k}", f"{sizes['layer']} layers, top_k={sizes['k']}")
    if trace.labels and len(trace.labels) != sizes["batch"]:
        check.fail(op, f"{len(trace.labels)} labels", f"{sizes['batch']}, one for each sample")
    return sizes


def check_requests(op: str, requests: Tensor, num_items: int) -> dict[str, int]:
    """Sizes of (batch, T, r) item ids after refusing ids outside 0..num_items-1 and repeats inside one token."""
    sizes = check.shapes(op, requests=(requests, "batch T r"))
    if requests.is_floating_point() or requests.dtype == torch.bool:
        check.fail(op, f"requests of {requests.dtype}", "integer item ids", error=TypeError)
    check.at_least(op, 1, **sizes, num_items=num_items)
    check.within(op, 0, num_items - 1, experts=requests)
    repeated = (requests.sort(-1).values.diff(dim=-1) == 0).any(-1)
    if bool(repeated.any()):
        batch, token = repeated.nonzero()[0].tolist()
        check.fail(op, f"sample {batch}, token {token} has an expert twice", "k different experts in a token")
    return sizes


def join(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """One trace with the samples (and labels) of all; logits and gate_in stay where every trace has them.

    Raises:
        ValueError: no trace, or traces that differ in experts, k, layers or length.
    """
    shapes = {(t.num_experts, t.top_k, t.layers, t.experts.shape[1]) for t in traces}
    if len(shapes) != 1:
        check.fail("join", f"{len(shapes)} different (num_experts, top_k, layers, tokens)", "one", "cut with .tokens()")
    parts = {name: [getattr(t, name) for t in traces] for name in ("experts", *KEEP)}
    joined = {name: None if any(x is None for x in xs) else torch.cat(xs) for name, xs in parts.items()}
    return traces[0]._replace(**joined, labels=tuple(label for t in traces for label in t.labels))


class _Site(NamedTuple):
    name: str  # of the module that is hooked
    top_k: int
    read: Callable[[Tensor, object], tuple[Tensor, Tensor]]  # (input, output) -> (logits, experts), (rows, ...)


def find_routers(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Routers by name with their k, found by structure: a child `router` or `gate` beside the experts.

    It qualifies when its weight is (expert, dim), it or its parent knows `top_k`, and the parent's experts (a list, or a
    module with `num_experts`) number as many as the weight has rows. That covers `models.tiny_moe` and the MoE blocks
    of transformers.
    """
    found = {}
    for name, parent in model.named_modules():
        for child in ("router", "gate"):
            module = getattr(parent, child, None)
            weight = getattr(module, "weight", None)
            top_k = getattr(module, "top_k", None) or getattr(parent, "top_k", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and top_k and len(weight) == _expert_count(parent):
                found[f"{name}.{child}".lstrip(".")] = (module, int(top_k))
                break
    return found


def _expert_count(parent: nn.Module) -> int | None:
    experts = getattr(parent, "experts", parent)
    return len(experts) if isinstance(experts, nn.ModuleList) else getattr(experts, "num_experts", None)


def _read_router(top_k: int) -> Callable:
    """Logits and experts from what a router returns: logits alone, or (logits, weights of the chosen, their ids)."""

    def read(x: Tensor, out) -> tuple[Tensor, Tensor]:
        if isinstance(out, Tensor):
            logits = out.flatten(0, -2)
            return logits, top_experts(logits, top_k)
        logits, weight, index = (part.flatten(0, -2) for part in out)
        by_id = index.sort(dim=-1)  # so that equal weights come by rising expert id
        order = weight.gather(-1, by_id.indices).sort(dim=-1, descending=True, stable=True).indices
        return logits, by_id.values.gather(-1, order)

    return read


def _sites(model: nn.Module, router) -> list[_Site]:
    if isinstance(router, str):
        check.one_of("record", ("auto",), router=router)
        found = find_routers(model)
        if not found:
            check.fail(
                "record", f"no router in {type(model).__name__}", "a mixture of experts", "pass router={name: router_fn}"
            )
        return [_Site(name, k, _read_router(k)) for name, (_, k) in found.items()]
    return [_Site(name, fn.top_k, lambda x, _, fn=fn: fn(x)) for name, fn in router.items()]


@torch.no_grad()
def record(
    model: nn.Module, ids: Tensor, *, router: str | Mapping[str, OracleRouter] = "auto", keep: Iterable[str] = KEEP,
    labels: Sequence[str] = (),
) -> RoutingTrace:  # fmt: skip
    """The trace of one forward over `ids` (batch, token), through hooks that are taken off again.

    Args:
        model: called as model(ids); it stays in its mode (dropout included) and is not changed.
        router: "auto" finds routers by structure; or the name of a dense feed-forward to the router that `moefy` made
            for it, which reads the feed-forward's input.
        keep: what to keep besides the experts, of "logits" and "gate_in"; both cost memory.
        labels: one for each sample, e.g. its domain.
    Raises:
        ValueError: no router found, routers that differ in experts or k, an unknown name in `keep` or `router`.
    """
    check.shapes("record", ids=(ids, "batch token"))
    check.one_of("record", KEEP, **{f"keep[{i}]": name for i, name in enumerate(keep)})
    sites, seen = _sites(model, router), {}
    modules = dict(model.named_modules())
    check.one_of("record", modules, **{f"router {site.name}": site.name for site in sites})

    def hook(site: _Site):
        def read(_module, args, out):
            x = args[0].reshape(*ids.shape, -1)
            logits, experts = site.read(x.flatten(0, 1), out)
            seen[site.name] = (experts.unflatten(0, ids.shape), logits.unflatten(0, ids.shape), x)

        return modules[site.name].register_forward_hook(read)

    with ExitStack() as stack:
        for site in sites:
            stack.callback(hook(site).remove)
        model(ids)
    return _assemble(sites, seen, tuple(keep), tuple(labels))


def _assemble(sites: list[_Site], seen: dict, keep: tuple[str, ...], labels: tuple[str, ...]) -> RoutingTrace:
    if idle := [site.name for site in sites if site.name not in seen]:
        check.fail("record", f"{', '.join(idle)} did not run", "routers that the forward reaches")
    kinds = {(site.top_k, seen[site.name][1].shape[-1]) for site in sites}
    if len(kinds) > 1:
        check.fail("record", f"routers of different (k, experts) {sorted(kinds)}", "one", "record each kind by itself")
    (top_k, num_experts), found = kinds.pop(), [seen[site.name] for site in sites]
    experts, logits, gate_in = (torch.stack(parts, 2) for parts in zip(*found, strict=True))
    layers = tuple(_layer(site.name, place) for place, site in enumerate(sites))
    trace = RoutingTrace(
        experts,
        logits if "logits" in keep else None,
        gate_in if "gate_in" in keep else None,
        num_experts,
        top_k,
        layers,
        labels,
    )
    check_trace("record", trace)
    return trace


def reroute(trace: RoutingTrace, routers: Sequence[OracleRouter]) -> RoutingTrace:
    """What other routers, one for each layer, would have chosen on the vectors that a trace kept in `gate_in`.

    Raises:
        ValueError: no `gate_in`, another number of routers than layers, or routers that differ in k or experts.
    """
    kinds = {(len(router.experts.neurons), router.top_k) for router in routers}
    if trace.gate_in is None or len(routers) != len(trace.layers) or len(kinds) != 1:
        came = f"{len(routers)} routers of kinds {sorted(kinds)} for {len(trace.layers)} layers"
        check.fail("reroute", came, "gate_in, and one router of one kind for each layer", "record with keep=('gate_in',)")
    found = [router(trace.gate_in[:, :, i].flatten(0, 1)) for i, router in enumerate(routers)]
    logits, experts = (torch.stack(parts, 1).unflatten(0, trace.gate_in.shape[:2]) for parts in zip(*found, strict=True))
    num_experts, top_k = kinds.pop()
    return trace._replace(experts=experts, logits=logits, num_experts=num_experts, top_k=top_k)


def shipped(name: str) -> RoutingTrace:
    """A trace of `datasets/routing_traces`, e.g. "smollm2_kmeans" or "base"; its card says on what it was recorded.

    Raises:
        ValueError: an unknown name, with the nearest, or a file that is not what its card says.
    """
    import io

    import xarray as xr

    from memlens.data import cards

    names = [file.removesuffix(".nc") for file in cards.read("routing_traces").sha256]
    check.one_of("shipped", names, name=name)
    return RoutingTrace.from_xarray(
        xr.load_dataset(io.BytesIO(cards.verified("routing_traces", f"{name}.nc")), engine="h5netcdf")
    )


def _layer(name: str, place: int) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), place)
