"""How well a group of experts chosen for a whole segment serves every token in it.

SRP (segment routing best performance) is the best F1 score of a router that must choose once for m tokens. SCH (segment
cache best hit rate) is what a cache reaches that sees m tokens ahead. Both rest on n[s, e], how many of the tokens
s..s+m-1 chose expert e: a segment router that takes e wherever n >= c scores

    F1 = 2 TP / (P + A),  TP = sum of n over windows with n >= c,  P = m * their number,  A = sum of n over all windows

and SRP is its maximum over c. The sums are pooled over experts before the maximum: F1 scores are never averaged.
Source: arXiv:2505.16056, sections 3.2 and 3.3; read together with ljcleo/moe-lrc.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlens import backend, check
from memlens.routing.caching import hit_curve
from memlens.routing.trace import RoutingTrace, check_requests, check_trace

if TYPE_CHECKING:
    import xarray as xr

__all__ = [
    "expert_specialization",
    "sch",
    "segment_counts",
    "segment_sums",
    "shuffle_control",
    "srp",
    "srp_controlled",
    "srp_floor",
]

LEVELS = ("expert", "layer", "model")
CONFIDENCE = 0.95


def srp_floor(ratio: float | Tensor) -> float | Tensor:
    """2r / (1 + r): the F1 of choosing every expert always (c = 0), where a share r = k/E is active."""
    check.within("srp_floor", 0, 1, ratio=ratio)
    return 2 * ratio / (1 + ratio)


def segment_counts(experts: Tensor, num_experts: int, m: int) -> Tensor:
    """n[b, s, e]: how many of tokens s..s+m-1 chose expert e, (batch, T-m+1, expert) int32, for all overlapping windows.

    Args:
        experts: (batch, T, k), all different within a token.
        m: window in tokens, 1..T; any length.
    Raises:
        ValueError: m outside 1..T, experts outside 0..num_experts-1 or twice in one token.
    """
    sizes = check_requests("segment_counts", experts, num_experts)
    check.within("segment_counts", 1, sizes["T"], m=m)
    active = F.one_hot(experts.long(), num_experts).sum(2, dtype=torch.int32)
    total = F.pad(active.cumsum(1, dtype=torch.int32), (0, 0, 1, 0))
    return total[:, m:] - total[:, :-m]


class Sums(NamedTuple):
    """What F1 is made of, for every sample, expert and threshold c = 0..m."""

    true: Tensor  # TP, (batch, expert, m+1) float64
    positive: Tensor  # P, (batch, expert, m+1)
    active: Tensor  # A, (batch, expert)


def segment_sums(experts: Tensor, num_experts: int, m: int, *, form: str = "auto") -> Sums:
    """TP, P and A of one layer's experts (batch, T, k) at every threshold.

    The reference walks over samples, windows and experts; torch counts a histogram of n and sums its tail.
    """
    if backend.choose("segment_sums", form, experts, kernel=False) == "reference":
        return _walk(experts, num_experts, m)
    counts = segment_counts(experts, num_experts, m).long().transpose(1, 2)  # (batch, expert, window)
    batch, height = len(counts), m + 1
    cell = torch.arange(batch * num_experts, device=counts.device).view(batch, num_experts, 1) * height + counts
    histogram = torch.bincount(cell.flatten(), minlength=batch * num_experts * height).view(batch, num_experts, height)
    weighted = histogram * torch.arange(height, device=counts.device)
    tail, weighted_tail = (x.flip(-1).cumsum(-1).flip(-1).double() for x in (histogram, weighted))
    return Sums(weighted_tail, m * tail, weighted_tail[..., 0])


def _walk(experts: Tensor, num_experts: int, m: int) -> Sums:
    sizes = check_requests("segment_sums", experts, num_experts)
    check.within("segment_sums", 1, sizes["T"], m=m)
    histogram = torch.zeros(sizes["batch"], num_experts, m + 1, dtype=torch.float64)
    for sample, tokens in enumerate(experts.tolist()):
        rows = [[0] * (m + 1) for _ in range(num_experts)]
        for start in range(sizes["T"] - m + 1):
            window = Counter(item for token in tokens[start : start + m] for item in token)
            for expert, row in enumerate(rows):
                row[window[expert]] += 1
        histogram[sample] = torch.tensor(rows)
    true, positive = torch.zeros_like(histogram), torch.zeros_like(histogram)
    for c in range(m + 1):
        for n in range(c, m + 1):
            true[..., c] += n * histogram[..., n]
            positive[..., c] += m * histogram[..., n]
    return Sums(true, positive, true[..., 0])


class _Best(NamedTuple):
    srp: Tensor
    size_ratio: Tensor
    threshold: Tensor
    act_ratio: Tensor


def _best(sums: Sums) -> _Best:
    """The best threshold of pooled sums (..., c): the first maximum; a group that is never active scores 0."""
    f1 = 2 * sums.true / (sums.positive + sums.active[..., None]).clamp(min=1)
    value, place = f1.max(-1)
    chosen = sums.positive.gather(-1, place[..., None])[..., 0]
    size = torch.where(sums.active > 0, chosen / sums.active.clamp(min=1), 0.0)
    return _Best(value, size, place, sums.active / sums.positive[..., 0])


def _pool(parts: list[Sums], level: str) -> Sums:
    """Sums (batch, group, ...) of a level: group is layer * expert, layer, or one."""
    if level == "expert":
        return Sums(*(torch.stack(xs, 1) for xs in zip(*parts, strict=True)))
    layers = Sums(*(torch.stack([x.sum(1) for x in xs], 1) for xs in zip(*parts, strict=True)))
    return layers if level == "layer" else Sums(*(x.sum(1) for x in layers))


def _resample(sums: Sums, draws: Tensor) -> Tensor:
    """SRP of every bootstrap draw, (draw, group...): `draws` (draw, batch) says how often each sample was drawn."""
    shape = sums.active.shape[1:]
    pooled = [(draws @ x.reshape(len(x), -1)).view(-1, *shape, *x.shape[1 + len(shape) :]) for x in sums]
    return _best(Sums(*pooled)).srp


def _interval(sums: Sums, value: Tensor, bootstrap: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    batch = len(sums.active)
    picks = torch.randint(batch, (bootstrap, batch), generator=generator)
    draws = F.one_hot(picks, batch).sum(1).double()
    tail = (1 - CONFIDENCE) / 2
    scores = torch.cat([_resample(sums, part) for part in draws.split(50)])
    low, high = torch.quantile(scores, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return 2 * value - high, 2 * value - low


def _groups(trace: RoutingTrace, by: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Sample numbers by label where `by` is ("dataset",) and the trace is labelled, else all of them as "all"."""
    check.one_of("by", ("dataset",), **{f"by[{i}]": name for i, name in enumerate(by)})
    labels = trace.labels if by and trace.labels else ("all",) * len(trace.experts)
    for label in dict.fromkeys(labels):
        yield label, torch.tensor([i for i, name in enumerate(labels) if name == label])


def srp(
    trace: RoutingTrace, m: int | Sequence[int], *, level: str = "layer", by: Sequence[str] = ("dataset",),
    bootstrap: int = 0, generator: torch.Generator | None = None, form: str = "auto",
) -> xr.Dataset:  # fmt: skip
    """SRP of a trace, with what it must be read against.

    Args:
        trace: its labels are the data sets.
        m: segment lengths in tokens, each 1..T; one number gives no `segment` dim.
        level: "expert" (dims layer, expert), "layer" or "model", at which sums are pooled before the best c is taken.
        by: ("dataset",) gives a value for each label, () pools all samples under "all".
        bootstrap: resamplings of the samples for a 95% interval, the same draws for every layer, data set of one
            size and m; 0 for none. Then `generator` is needed.
        form: of the sums, "reference" or "torch".
    Returns:
        A Dataset with dims (segment, dataset, layer, expert), as far as they apply: `srp` in 0..1, higher is more
        consistent; `size_ratio`, experts the segment router takes for each one a token uses; `threshold`, the best c;
        `act_ratio`, k/E at layer level; `floor`, the F1 of taking everything; with bootstrap `ci_lb`, `ci_ub`, the
        pivotal interval [2v - q.975, 2v - q.025]. A never-active expert has srp and size_ratio 0.
    Raises:
        ValueError: m outside 1..T, experts out of range or twice in a token, an unknown level or `by`.
    """
    import xarray as xr

    check.one_of("srp", LEVELS, level=level)
    check.at_least("srp", 0, bootstrap=bootstrap)
    check_trace("srp", trace)
    if bootstrap and generator is None:
        check.fail("srp", f"bootstrap={bootstrap} without a generator", "a torch.Generator to draw samples with")
    lengths = [m] if isinstance(m, int) else list(m)
    state = generator.get_state() if bootstrap else None
    rows = []
    for length in lengths:
        layers = trace.experts.unbind(2)
        sums = _pool([segment_sums(experts, trace.num_experts, length, form=form) for experts in layers], level)
        found = []
        for label, samples in _groups(trace, by):
            if bootstrap:
                generator.set_state(state)
            values = _measure(Sums(*(x[samples] for x in sums)), bootstrap, generator)
            found.append(_dataset(trace, level, values).expand_dims(dataset=[label]))
        rows.append(xr.concat(found, "dataset"))
    out = xr.concat(rows, xr.Variable("segment", lengths, {"long_name": "segment length", "units": "tokens"}))
    return _described(out.isel(segment=0) if isinstance(m, int) else out)


def _measure(sums: Sums, bootstrap: int, generator) -> dict[str, Tensor]:
    best = _best(Sums(*(x.sum(0) for x in sums)))
    values = {**best._asdict(), "floor": srp_floor(best.act_ratio)}
    if bootstrap:
        values["ci_lb"], values["ci_ub"] = _interval(sums, best.srp, bootstrap, generator)
    return values


def _dataset(trace: RoutingTrace, level: str, values: dict[str, Tensor]) -> xr.Dataset:
    import xarray as xr

    dims = {"expert": ("layer", "expert"), "layer": ("layer",), "model": ()}[level]
    coords = {"layer": list(trace.layers)} if "layer" in dims else {}
    return xr.Dataset({name: (dims, value.numpy()) for name, value in values.items()}, coords)


NAMES = {
    "srp": "SRP",
    "size_ratio": "experts taken for each active one",
    "threshold": "best threshold",
    "act_ratio": "share of active experts",
    "floor": "every expert taken",
    "shuffled": "SRP, text shuffled",
    "ci_lb": "SRP, lower end of 95%",
    "ci_ub": "SRP, upper end of 95%",
}


def _described(out: xr.Dataset) -> xr.Dataset:
    for name in out.data_vars:
        out[name].attrs = {"long_name": NAMES[name], "units": "tokens" if name == "threshold" else "1"}
    return out


def sch(
    trace: RoutingTrace, m: int, *, level: str = "layer", by: Sequence[str] = ("dataset",), policy: str = "segment",
    form: str = "auto",
) -> xr.DataArray:  # fmt: skip
    """Mean hit rate of a cache that sees m tokens ahead, for every capacity: dims (dataset, layer, capacity).

    At model level one cache of up to E * layers slots serves all layers, whose requests stand side by side in a token.
    The cache ratio of a capacity, slots for each expert a token uses, is the coordinate `ratio`.

    Args:
        policy: "segment", or another of `caching.hit_curve`, which ignores m, to compare with.
    Raises:
        ValueError: m outside 1..T, an unknown level, policy or `by`, and what `check_trace` refuses.
    """
    import xarray as xr

    check.one_of("sch", LEVELS[1:], level=level)
    sizes = check_trace("sch", trace)
    check.within("sch", 1, sizes["token"], m=m)
    requests, items = trace.experts.transpose(1, 2).flatten(0, 1), trace.num_experts
    if level == "model":
        offset = torch.arange(sizes["layer"])[:, None] * items
        requests, items = (trace.experts + offset).flatten(2), items * sizes["layer"]
    rates = hit_curve(requests, items, policy, future=m if policy == "segment" else None, form=form)
    if level == "layer":
        rates = rates.unflatten(0, (sizes["batch"], sizes["layer"]))
    dims = ("layer", "capacity") if level == "layer" else ("capacity",)
    values = [rates[samples].mean(0).numpy() for _, samples in _groups(trace, by)]
    capacity = torch.arange(1, items + 1).numpy()
    out = xr.DataArray(
        values, dims=("dataset", *dims), name="hit_rate", attrs={"long_name": "hit rate", "units": "1"},
        coords={"dataset": [label for label, _ in _groups(trace, by)], "capacity": capacity},
    )  # fmt: skip
    out = out.assign_coords(ratio=("capacity", capacity / requests.shape[-1]))
    out["capacity"].attrs = {"long_name": "cache capacity", "units": "experts"}
    out["ratio"].attrs = {"long_name": "cache slots for each active expert", "units": "1"}
    return out.assign_coords(layer=list(trace.layers)) if level == "layer" else out


def shuffle_control(trace: RoutingTrace, generator: torch.Generator) -> RoutingTrace:
    """The trace with the tokens of each sample in random order, the same order in all layers: locality gone, loads kept."""
    sizes = check_trace("shuffle_control", trace)
    order = torch.stack([torch.randperm(sizes["token"], generator=generator) for _ in range(sizes["batch"])])
    rows = torch.arange(sizes["batch"])[:, None]
    kept = {
        name: None if (x := getattr(trace, name)) is None else x[rows, order] for name in ("experts", "logits", "gate_in")
    }
    return trace._replace(**kept)


def srp_controlled(
    trace: RoutingTrace, m: int | Sequence[int], *, shuffles: int = 5, generator: torch.Generator, **options
) -> xr.Dataset:
    """`srp(trace, m, **options)` with one more variable, `shuffled`: the mean SRP of `shuffles` shuffled controls.

    srp - floor is what the model has over taking everything; shuffled - floor is the part of it that unequal loads
    explain; srp - shuffled is locality.

    Raises:
        ValueError: shuffles below 1, and what `srp` refuses.
    """
    check.at_least("srp_controlled", 1, shuffles=shuffles)
    out = srp(trace, m, generator=generator, **options)
    plain = {name: value for name, value in options.items() if name != "bootstrap"}
    controls = [srp(shuffle_control(trace, generator), m, **plain).srp for _ in range(shuffles)]
    return out.assign(shuffled=(sum(controls) / shuffles).assign_attrs(long_name=NAMES["shuffled"], units="1"))


def expert_specialization(trace: RoutingTrace, labels: Sequence[str] | Tensor, *, least: int = 20) -> xr.DataArray:
    """How unevenly an expert serves different kinds of tokens: dims (layer, expert), 0 for even.

    cv = std / mean over labels of f, the share of a label's tokens that chose the expert (std with n - 1). An expert that
    is never chosen has cv 0.

    Args:
        labels: one for each sample (domain specialization), or token ids (batch, token) (vocabulary specialization).
        least: labels with fewer tokens are left out.
    Raises:
        ValueError: labels of a wrong shape, or fewer than two that are frequent enough.
    """
    import xarray as xr

    sizes = check_trace("expert_specialization", trace)
    if not isinstance(labels, Tensor):
        names = list(dict.fromkeys(labels))
        labels = torch.tensor([names.index(label) for label in labels])[:, None].expand(-1, sizes["token"])
    check.shapes("expert_specialization", labels=(labels, f"{sizes['batch']} {sizes['token']}"))
    _, kind, counts = labels.unique(return_inverse=True, return_counts=True)
    active = F.one_hot(trace.experts, trace.num_experts).sum(3).double().flatten(0, 1)  # (token, layer, expert)
    chosen = active.new_zeros(len(counts), *active.shape[1:]).index_add_(0, kind.flatten(), active)
    frequent = counts >= least
    if int(frequent.sum()) < 2:
        check.fail(
            "expert_specialization", f"{int(frequent.sum())} labels with {least} tokens", "at least two", "lower least="
        )
    share = chosen[frequent] / counts[frequent, None, None]
    mean = share.mean(0)
    cv = torch.where(mean > 0, share.std(0) / mean.clamp(min=1e-300), 0.0)
    attrs = {"long_name": "specialization (coefficient of variation)", "units": "1"}
    coords = {"layer": list(trace.layers)}
    return xr.DataArray(cv.numpy(), coords, ("layer", "expert"), "specialization", attrs)
