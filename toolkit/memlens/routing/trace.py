"""Which experts a router chose, token by token: recorded from a mixture of experts, or made from a dense model.

`record` watches a model through forward hooks and changes nothing. `moefy` splits a dense feed-forward into experts and
scores them by what they really contribute, so that a dense model gives a trace too (an "oracle split": the score needs
the dense activations and is an upper bound on any router).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlens import check
from memlens.routing.gate import Gate, mix_experts, top_experts

__all__ = ["Experts", "OracleRouter", "RoutingTrace", "check_trace", "find_routers", "join", "moefy", "record"]

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


def _layer(name: str, place: int) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), place)


class Experts(NamedTuple):
    neurons: Tensor  # (expert, hidden) int64, which neurons of the dense feed-forward each expert took
    w_gate: Tensor  # (expert, hidden, dim)
    w_up: Tensor  # (expert, hidden, dim)
    w_down: Tensor  # (expert, dim, hidden)

    def __call__(self, x: Tensor, index: Tensor) -> Tensor:
        """The sum over the chosen experts, (tokens, dim), for x (tokens, dim) and index (tokens, k)."""
        ones = torch.ones_like(index, dtype=x.dtype)
        return mix_experts(x, Gate(ones, index), self.w_gate, self.w_up, self.w_down)


class OracleRouter(NamedTuple):
    experts: Experts
    top_k: int

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (tokens, expert) and the chosen experts (tokens, k) for x (tokens, dim).

        score_e = sum_{j in e} (silu(gate_j x) * up_j x)^2 * ||down_j||^2, the energy each neuron writes.
        """
        w_gate, w_up, w_down = self.experts[1:]
        energy = (F.silu(x @ w_gate.flatten(0, 1).T) * (x @ w_up.flatten(0, 1).T)).square()
        energy = energy * w_down.square().sum(1).flatten()
        scores = energy.unflatten(-1, w_gate.shape[:2]).sum(-1)
        return scores, top_experts(scores, self.top_k)


def moefy(
    mlp: nn.Module, num_experts: int, top_k: int, *, split: str = "kmeans", generator
) -> tuple[Experts, OracleRouter]:
    """A dense gated feed-forward cut into `num_experts` equal experts, and the oracle router that picks k of them.

    With top_k = num_experts the experts sum to the dense output. Neurons are grouped by balanced k-means on the
    unit-length rows of the gate projection ("kmeans"), or at random.

    Args:
        mlp: down(silu(gate(x)) * up(x)), with linears named gate_proj, up_proj, down_proj or gate, up, down, no bias.
        generator: draws the random split, or the first centroids.
    Raises:
        ValueError: another activation or a bias, num_experts that does not divide the neurons, an unknown split.
    Source: the split follows arXiv:2110.01786, section 3.2.
    """
    check.one_of("moefy", ("kmeans", "random"), split=split)
    gate, up, down = _projections(mlp)
    check.divides("moefy", num_experts=num_experts, neurons=len(gate))
    check.within("moefy", 1, num_experts, top_k=top_k)
    if split == "random":
        neurons = torch.randperm(len(gate), generator=generator).view(num_experts, -1)
    else:
        neurons = balanced_kmeans(F.normalize(gate, dim=-1), num_experts, generator=generator)
    experts = Experts(neurons, gate[neurons], up[neurons], down.T[neurons].transpose(1, 2).contiguous())
    return experts, OracleRouter(experts, top_k)


def _projections(mlp: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    for suffix in ("_proj", ""):
        linears = [getattr(mlp, name + suffix, None) for name in ("gate", "up", "down")]
        if all(isinstance(linear, nn.Linear) for linear in linears):
            break
    else:
        check.fail("moefy", f"{type(mlp).__name__} without gate, up and down linears", "a gated feed-forward")
    probe = torch.linspace(-4, 4, 9)
    act = getattr(mlp, "act_fn", F.silu)
    if any(linear.bias is not None for linear in linears) or not torch.allclose(act(probe), F.silu(probe), atol=1e-6):
        check.fail("moefy", f"{type(mlp).__name__} with a bias or another activation", "silu and no bias")
    return tuple(linear.weight.detach() for linear in linears)


def balanced_kmeans(x: Tensor, clusters: int, *, iters: int = 10, generator) -> Tensor:
    """Row ids (clusters, rows / clusters) of k-means clusters of one size, each sorted.

    Every round gives out (row, cluster) pairs by rising squared distance while the cluster has room, then moves the
    centroids to the means; it stops when nothing moves.
    """
    check.divides("balanced_kmeans", clusters=clusters, rows=len(x))
    centroids, assigned = x[torch.randperm(len(x), generator=generator)[:clusters]], None
    for _ in range(iters):
        previous, assigned = assigned, _give_out(torch.cdist(x, centroids))
        if previous is not None and torch.equal(previous, assigned):
            break
        centroids = x[assigned].mean(1)
    return assigned


def _give_out(distance: Tensor) -> Tensor:
    rows, clusters = distance.shape
    room, members, placed = rows // clusters, [[] for _ in range(clusters)], [False] * rows
    for pair in distance.flatten().argsort(stable=True).tolist():
        row, cluster = divmod(pair, clusters)
        if not placed[row] and len(members[cluster]) < room:
            placed[row] = True
            members[cluster].append(row)
    return torch.tensor(members).sort(-1).values
