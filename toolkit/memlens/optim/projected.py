"""`Projected`: low-rank-state optimizers behind torch.optim's door, for Linear weights; everything else gets plain Adam.

optimizer = Projected(projected_groups(model, rank=128), rule="galore", lr=0.01, states="dyn8")
print(optimizer.describe())
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memlens import check
from memlens.optim.galore import ProjectedState, galore_low
from memlens.optim.lowbit import Codec, CodedMoments, Packed, coded_direction, dyn8, plain
from memlens.optim.projection import Subspace, add_unprojected_, pick_side

__all__ = ["RULES", "STATES", "Projected", "Rule", "projected_groups"]

STATES = {
    "float32": (plain(torch.float32),) * 2,
    "bfloat16": (plain(torch.bfloat16),) * 2,
    "dyn8": (dyn8(signed=True), dyn8(signed=False)),
}
SMALL = 4096  # elements below which a moment stays float32


class Rule(NamedTuple):
    update: Callable[[Tensor, Any, Mapping], tuple[Tensor, Any]]  # gradient, state or None, options -> direction, new state
    low: bool  # whether that direction still lies in the subspace `sub` of the new state
    state: type  # the NamedTuple that it keeps
    parts: dict[str, type]  # the NamedTuples inside it, by dotted path
    size: Callable[[Tensor, Mapping], int]  # bytes of state that a parameter will take


def _codecs(options: Mapping, numel: int) -> tuple[Codec, Codec]:
    return STATES["float32" if numel < SMALL else options["states"]]


def _low_shape(p: Tensor, rank: int) -> tuple[int, int]:
    """(rank, long side) of the projected gradient."""
    return min(rank, *p.shape), max(p.shape)


def _adam(g: Tensor, state: CodedMoments | None, options: Mapping) -> tuple[Tensor, CodedMoments]:
    return coded_direction(g, state, *_codecs(options, g.numel()), options["betas"], options["eps"], "hf")


def _adam_size(p: Tensor, options: Mapping) -> int:
    return sum(codec.size(p.numel()) for codec in _codecs(options, p.numel()))


def _galore(g: Tensor, state: ProjectedState | None, options: Mapping) -> tuple[Tensor, ProjectedState]:
    rank, long = _low_shape(g, options["rank"])
    m_codec, v_codec = _codecs(options, rank * long)
    chosen = {name: options[name] for name in ("rank", "every", "betas", "eps")}
    low, state = galore_low(g, state, m_codec=m_codec, v_codec=v_codec, **chosen)
    return low.mul_(options["alpha"]), state


def _galore_size(p: Tensor, options: Mapping) -> int:
    rank, long = _low_shape(p, options["rank"])
    moments = sum(codec.size(rank * long) for codec in _codecs(options, rank * long))
    return min(p.shape) * rank * p.element_size() + moments


ADAM = Rule(_adam, False, CodedMoments, {"m": Packed, "v": Packed}, _adam_size)
_PARTS = {"sub": Subspace, "inner": CodedMoments, "inner.m": Packed, "inner.v": Packed}
RULES = {"galore": Rule(_galore, True, ProjectedState, _PARTS, _galore_size)}


def _flatten(state: NamedTuple, path: str = "") -> dict[str, Any]:
    """Nested NamedTuples as one dict of tensors and plain values by dotted path, so that no class is pickled."""
    flat = {}
    for name, value in state._asdict().items():
        flat |= _flatten(value, f"{path}{name}.") if hasattr(value, "_asdict") else {path + name: value}
    return flat


def _unflatten(flat: Mapping[str, Any], kind: type, parts: Mapping[str, type], path: str = "") -> NamedTuple:
    """The inverse of `_flatten`."""
    at = {name: f"{path}.{name}" if path else name for name in kind._fields}
    return kind(*(_unflatten(flat, parts[key], parts, key) if key in parts else flat[key] for key in at.values()))


def projected_groups(model: nn.Module, *, rank: int, exclude: Iterable[str] = ("embed", "head")) -> list[dict]:
    """Two parameter groups with names: weights of Linear layers with a rank, everything else with rank None (plain Adam).

    Args:
        model: its trainable parameters are taken, each once.
        rank: of the projected group.
        exclude: modules whose dotted name contains one of these words stay with plain Adam.
    Raises:
        ValueError: a model in which no Linear weight is left to project.
    """
    check.at_least("projected_groups", 1, rank=rank)
    exclude = tuple(exclude)
    chosen = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(word in name for word in exclude)
    } - {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    low, full = ([pair for pair in named if (id(pair[1]) in chosen) is wanted] for wanted in (True, False))
    if not low:
        check.fail("projected_groups", f"no Linear weight outside {exclude}", "at least one", "shorten `exclude`")
    return [{"params": low, "rank": rank}, *([{"params": full, "rank": None}] if full else [])]


class Projected(torch.optim.Optimizer):
    """An optimizer whose state lives in a low-rank view of the gradient.

    A group with `rank` follows the rule; a group with `rank=None` follows Adam with the same lr, betas, eps and states.
    Weight decay is decoupled and is not scaled by alpha.

    Args:
        params: tensors or groups; `projected_groups(model, rank=...)` makes them. Each group may set every option below.
        rule: one of `RULES`.
        lr, betas, eps, weight_decay: as in Adam; eps is added to sqrt(v) before the bias correction.
        rank: directions kept, capped at the short side; None for plain Adam.
        every: steps between two subspaces. alpha: factor on the projected update.
        states: how moments are stored, one of `STATES`; below 4096 elements always float32.
        layerwise: update each parameter inside backward, as soon as its gradient is there, and free the gradient. `step`
            then finds nothing left to do. Not for gradient accumulation or clipping by the global norm.
    Raises:
        ValueError: an unknown rule (the known ones are listed) or storage, options out of range, a parameter in a projected
            group that is no matrix.
    """

    def __init__(
        self, params, rule: str = "galore", *, lr: float = 0.01, rank: int | None = 128, every: int = 200,
        alpha: float = 0.25, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0,
        states: str = "float32", layerwise: bool = False,
    ):  # fmt: skip
        self._layerwise, self._hooks = layerwise, []
        options = {"rule": rule, "lr": lr, "rank": rank, "every": every, "alpha": alpha, "betas": betas, "eps": eps}
        super().__init__(params, {**options, "weight_decay": weight_decay, "states": states})

    def add_param_group(self, param_group: dict) -> None:
        """Add a group after checking its options and shapes; in layer-wise mode its hooks are set."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        if self._layerwise:
            self._hooks += [p.register_post_accumulate_grad_hook(self._hook(group)) for p in group["params"]]

    def _hook(self, group: dict) -> Callable[[Tensor], None]:
        place = len(self.param_groups) - 1  # load_state_dict puts new dicts into the list

        @torch.no_grad()
        def update(p: Tensor) -> None:
            self._update(p, self.param_groups[place])
            p.grad = None

        return update

    def unhook(self) -> None:
        """Leave layer-wise mode: gradients stay until `step` uses them."""
        while self._hooks:
            self._hooks.pop().remove()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient; the closure's loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict) -> None:
        rule = _rule(group)
        held = self.state.get(p)
        state = _unflatten(held, rule.state, rule.parts) if held else None
        direction, state = rule.update(p.grad, state, group)
        if rule.low:
            add_unprojected_(p, direction, state.sub, -group["lr"])
        else:
            p.add_(direction, alpha=-group["lr"])
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        self.state[p] = _flatten(state)

    def load_state_dict(self, state_dict: dict) -> None:
        """Resume exactly: unlike torch's own, stored tensors keep their dtype (codes are integers, scales float32).

        Raises:
            ValueError: groups of other sizes, or an unknown rule.
        """
        for group in state_dict["param_groups"]:
            check.one_of("Projected.load_state_dict", RULES, rule=group.get("rule"))
        super().load_state_dict(state_dict)
        order = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(order, params, strict=True):
            held = state_dict["state"].get(key, {})
            if held:
                self.state[p] = {k: v.to(p.device, copy=True) if isinstance(v, Tensor) else v for k, v in held.items()}

    def state_bytes(self) -> dict[str, int]:
        """Bytes held now, by part: "sub.basis", "inner.m.codes", ..., summed over the parameters."""
        total: dict[str, int] = {}
        for held in self.state.values():
            for name, value in held.items():
                if isinstance(value, Tensor) and value.nbytes:
                    total[name] = total.get(name, 0) + value.nbytes
        return total

    def describe(self) -> str:
        """A table: each parameter, its shape, side and rank, how moments are stored, bytes of state and of float32 Adam."""
        rows = [("parameter", "shape", "rule", "side", "rank", "states", "bytes", "Adam")]
        size, adam = 0, 0
        for group in self.param_groups:
            names = group.get("param_names") or [f"#{i}" for i in range(len(group["params"]))]
            for name, p in zip(names, group["params"], strict=True):
                rows.append(_row(name, p, group))
                size, adam = size + _rule(group).size(p, group), adam + 8 * p.numel()
        rows.append(("total", "", "", "", "", "", f"{size:,}", f"{adam:,}"))
        return _table(rows)


def _rule(group: Mapping) -> Rule:
    return ADAM if group["rank"] is None else RULES[group["rule"]]


def _table(rows: list[tuple[str, ...]], numbers: int = 2) -> str:
    """Aligned columns, the last `numbers` of them to the right."""
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<"] * (len(wide) - numbers) + [">"] * numbers
    return "\n".join("  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, wide, strict=True)).rstrip() for row in rows)


def _row(name: str, p: Tensor, group: Mapping) -> tuple[str, ...]:
    shape, size, adam = "x".join(map(str, p.shape)), f"{_rule(group).size(p, group):,}", f"{8 * p.numel():,}"
    if group["rank"] is None:
        kept, where = p.numel(), ("adam", "", "")
    else:
        rank, long = _low_shape(p, group["rank"])
        kept, where = rank * long, (group["rule"], pick_side(*p.shape), str(rank))
    return name, shape, *where, "float32" if kept < SMALL else group["states"], size, adam


def _check_group(group: Mapping) -> None:
    op = "Projected"
    check.one_of(op, RULES, rule=group["rule"])
    check.one_of(op, STATES, states=group["states"])
    check.within(op, 0.0, float("inf"), **{name: group[name] for name in ("lr", "eps", "weight_decay", "alpha")})
    if group["rank"] is None:
        return
    check.at_least(op, 1, rank=group["rank"], every=group["every"])
    for p in group["params"]:
        if p.ndim != 2:
            check.fail(op, f"a parameter of shape {tuple(p.shape)} with rank={group['rank']}", "a matrix",
                       "put it in a group with rank=None, or use projected_groups(model, rank=...)")  # fmt: skip
