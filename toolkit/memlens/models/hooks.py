"""Read or replace the attention of a transformers model for the length of a `with`, through its public interfaces.

The model is as it was on exit, also after an exception. Tensors are laid out (batch, heads, length, dim); keys come after
rotary positions and with the cache in front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from memlens import check
from memlens.attention.call import Call, visible

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["QKV", "capture_qkv", "gate_heads", "rotary_frequencies", "use_attention"]

NAME = "memlens"
AttentionFn = Callable[[int, Tensor, Tensor, Tensor, int], Tensor | None]


class QKV(NamedTuple):
    q: Tensor  # (batch, heads, length, dim)
    k: Tensor  # (batch, kv_heads, length, dim)
    v: Tensor  # (batch, kv_heads, length, dim)


# which function stands in for which attention module's own, innermost context last
_active: WeakKeyDictionary[nn.Module, list[AttentionFn]] = WeakKeyDictionary()


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The attention modules by layer: those with a `layer_idx` and an output projection `o_proj`.

    Raises:
        ValueError: a model without any, or with two for one layer.
    """
    found = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "o_proj")]
    layers = {module.layer_idx: module for module in found}
    if not layers or len(layers) != len(found):
        came = f"{type(model).__name__} has {len(found)} attention modules for {len(layers)} layers"
        check.fail("hooks", came, "one module with layer_idx and o_proj for each layer, as in Llama")
    return layers


@contextmanager
def use_attention(model: PreTrainedModel, fn: AttentionFn) -> Iterator[PreTrainedModel]:
    """Inside the `with`, `fn(layer, q, k, v, causal_offset)` computes the model's attention.

    `fn` gets q (B,H,Tq,D) and k, v (B,Hkv,Tk,D) and returns out (B,H,Tq,D), or None for torch's own attention. Query i
    is at position causal_offset + i. Scores are to be scaled by D ** -0.5, which every model that is let in uses.
    Contexts nest; the inner one wins.

    Raises:
        ValueError: a model without attention layers; in the forward, an out of the wrong shape, another scale, a soft
            cap, or padding, sliding windows and whatever else is not plain causal attention.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    modules = list(attention_modules(model).values())
    AttentionInterface.register(NAME, _dispatch)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    for module in modules:
        _active.setdefault(module, []).append(fn)
    try:
        model.set_attn_implementation(NAME)
        yield model
    finally:
        model.set_attn_implementation(before)
        for module in modules:
            _active[module].pop()


def _dispatch(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **options):
    """What transformers calls: out as (batch, length, heads, dim), and no weights."""
    from transformers import AttentionInterface

    offset = k.shape[2] - q.shape[2]
    _check_plain(q, k, attention_mask, offset, options)
    out = _active[module][-1](module.layer_idx, q, k, v, offset)
    if out is None:
        return AttentionInterface()["sdpa"](module, q, k, v, attention_mask, **options)
    if out.shape != (*q.shape[:3], v.shape[-1]):
        check.fail("use_attention", f"fn returned {tuple(out.shape)}", f"out {(*q.shape[:3], v.shape[-1])}")
    return out.transpose(1, 2).contiguous(), None


def _check_plain(q: Tensor, k: Tensor, mask: Tensor | None, offset: int, options: dict) -> None:
    for name in ("softcap", "sliding_window", "position_bias"):
        if options.get(name) is not None:
            check.fail("use_attention", f"the model passes {name}={options[name]}", "plain causal attention")
    scale = options.get("scaling")
    if scale is not None and abs(scale * q.shape[-1] ** 0.5 - 1) > 1e-6:
        check.fail("use_attention", f"the model scales scores by {scale}", "dim ** -0.5")
    if mask is None:
        return
    rows, keys = slice(0, q.shape[2]), slice(0, k.shape[2])
    causal = visible(Call(1.0, True, offset), rows, keys, q.device)
    seen = mask if mask.dtype == torch.bool else mask == 0
    if not bool((seen if causal is None else seen == causal).all()):
        check.fail(
            "use_attention", "a mask that is not plain causal", "sequences of one length", "run them one by one, unpadded"
        )


@torch.no_grad()
def capture_qkv(
    model: PreTrainedModel, ids: Tensor, *, layers: Iterable[int] | None = None, pre_rope: bool = False
) -> dict[int, QKV]:
    """Queries, keys and values of a forward over `ids`, by layer.

    Args:
        ids: (batch, length), unpadded.
        layers: which ones; default all.
        pre_rope: q and k before rotary positions (values have none).
    Raises:
        ValueError: a layer that the model lacks.
    """
    check.shapes("capture_qkv", ids=(ids, "batch length"))
    modules = attention_modules(model)
    wanted = sorted(modules) if layers is None else list(layers)
    for layer in wanted:
        check.one_of("capture_qkv", map(str, modules), layers=str(layer))
    got: dict[int, QKV] = {}
    raw: dict[tuple[int, str], Tensor] = {}

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, offset: int) -> None:
        if layer in wanted:
            if pre_rope:
                q, k = (_heads_first(raw.pop((layer, name)), like) for name, like in (("q", q), ("k", k)))
            got[layer] = QKV(q, k, v)

    with ExitStack() as stack:
        for layer, name in [(layer, name) for layer in wanted for name in "qk"] if pre_rope else ():
            stack.callback(_record(modules[layer], name, raw, (layer, name)).remove)
        stack.enter_context(use_attention(model, keep))
        model.base_model(input_ids=ids, use_cache=False)
    return {layer: got[layer] for layer in wanted}


def _record(module: nn.Module, name: str, raw: dict, key: tuple[int, str]):
    """Keep the last thing a projection gives before rotation: its norm's output where there is one."""
    source = getattr(module, f"{name}_norm", None) or getattr(module, f"{name}_proj")
    return source.register_forward_hook(lambda _, inputs, output: raw.__setitem__(key, output))


def _heads_first(x: Tensor, like: Tensor) -> Tensor:
    """(batch, length, ...) as (batch, heads, length, dim)."""
    return x.reshape(*x.shape[:2], -1, like.shape[-1]).transpose(1, 2)


@contextmanager
def gate_heads(model: PreTrainedModel, gates: Tensor, *, positions: str | Tensor = "all") -> Iterator[PreTrainedModel]:
    """Inside the `with`, each head's output is multiplied by its gate before the output projection; differentiable.

    Args:
        gates: (layers, heads); 1 leaves a head as it is, 0 removes it. Gradients flow into it.
        positions: "all", "last", or token indices (long) that are gated while the others stay as they are.
    Raises:
        ValueError: gates of another shape, or an unknown word for positions.
    """
    modules = attention_modules(model)
    heads = model.config.num_attention_heads
    if tuple(gates.shape) != (len(modules), heads):
        check.fail("gate_heads", f"gates has shape {tuple(gates.shape)}", f"(layers={len(modules)}, heads={heads})")
    if isinstance(positions, str):
        check.one_of("gate_heads", ("all", "last"), positions=positions)
    with ExitStack() as stack:
        for row, layer in enumerate(sorted(modules)):
            hook = _gate(gates[row], positions)
            stack.callback(modules[layer].o_proj.register_forward_pre_hook(hook).remove)
        yield model


def _gate(gate: Tensor, positions: str | Tensor) -> Callable:
    def hook(_, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0].unflatten(-1, (gate.numel(), -1))  # (batch, length, heads, dim)
        factor = gate[:, None].to(x.dtype)
        if not (isinstance(positions, str) and positions == "all"):
            chosen = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
            chosen[-1 if isinstance(positions, str) else positions] = True
            factor = torch.where(chosen[:, None, None], factor, torch.ones_like(factor))
        return (x * factor).flatten(-2), *inputs[1:]

    return hook


def rotary_frequencies(model: nn.Module) -> Tensor | None:
    """The rotary frequencies (dim / 2,) of a transformers model; None unless it has one table, over whole heads."""
    found = [x for name, x in model.named_buffers() if name.endswith("rotary_emb.inv_freq")]
    config = model.config.get_text_config()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return found[0] if len(found) == 1 and 2 * found[0].numel() == dim else None
