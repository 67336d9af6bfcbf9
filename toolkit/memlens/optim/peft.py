"""Low-rank adapters, on or off token by token.

    adapter = lora_init(model, rank=8, alpha=16, generator=generator)
    with lora(model, adapter, mask=on):                 # on (B, L): which tokens go through the adapter
        logits = model(ids).logits

An adapter adds scale ((x aᵀ) bᵀ) to a linear layer's output. Trained with the prompt masked, it learns to read the keys and
values that the *base* model made of the prompt, so one prefill serves the base model and every adapter. The last prompt token
is not masked: the first token of the answer is predicted from it.

Source: LoRA, arXiv:2106.09685; the masking is that of efficient reasoning on the edge, arXiv:2603.16867.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memlens import check

__all__ = ["Adapter", "Pair", "load_adapter", "lora", "lora_init", "lowrank_delta", "response_mask", "save_adapter"]


class Pair(NamedTuple):
    a: Tensor  # (r, d_in)
    b: Tensor  # (d_out, r)


class Adapter(NamedTuple):
    pairs: dict[str, Pair]  # by the name of the linear layer
    scale: float  # alpha / rank

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained, a and b of each layer in turn."""
        return [x for pair in self.pairs.values() for x in pair]

    @property
    def numel(self) -> int:
        return sum(x.numel() for x in self.parameters)


def lowrank_delta(x: Tensor, a: Tensor, b: Tensor, s: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """scale ((x aᵀ) sᵀ) bᵀ, (..., d_out); the product of the factors is never made.

    Args:
        x: (..., d_in); a: (r, d_in); b: (d_out, r); s: (r, r), left out where None.
    """
    check.shapes("lowrank_delta", x=(x, "... d_in"), a=(a, "r d_in"), b=(b, "d_out r"), s=(s, "r r"))
    low = x @ a.T
    return scale * ((low if s is None else low @ s.T) @ b.T)


def every_linear(name: str, module: nn.Module) -> bool:
    """All linear layers but the head."""
    return isinstance(module, nn.Linear) and not name.endswith("lm_head")


def lora_init(
    model: nn.Module, *, rank: int, alpha: float, generator: torch.Generator,
    select: Callable[[str, nn.Module], bool] = every_linear,
) -> Adapter:  # fmt: skip
    """A new adapter: a normal with deviation d_in ** -0.5, b zero, so that nothing changes at first.

    Args:
        rank: of the change, at least 1; alpha: scale x rank.
        select: which layers, by name and module.
    Raises:
        ValueError: a rank below 1, or no linear layer selected.
    """
    check.at_least("lora_init", 1, rank=rank)
    chosen = {name: module for name, module in model.named_modules() if select(name, module)}
    if not chosen or not all(isinstance(module, nn.Linear) for module in chosen.values()):
        check.fail("lora_init", f"{len(chosen)} layers selected", "linear layers, at least one")
    pairs = {}
    for name, module in chosen.items():
        a = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
        pairs[name] = Pair(a.requires_grad_(), torch.zeros(module.out_features, rank).requires_grad_())
    return Adapter(pairs, alpha / rank)


@contextmanager
def lora(model: nn.Module, adapter: Adapter, *, mask: Tensor | None = None) -> Iterator[nn.Module]:
    """Inside the `with`, the model's linear layers have the adapter where `mask` is True; outside it is the base model.

    Args:
        mask: (B, L) bool, as the ids of every forward inside; None is everywhere. A token that is off gets the base
            layer's output bit for bit.
    Raises:
        KeyError: a layer that the model has not; in a forward, ValueError: ids of another shape than the mask.
    """
    if mask is not None and (mask.ndim != 2 or mask.dtype != torch.bool):
        check.fail("lora", f"mask {tuple(mask.shape)} of {mask.dtype}", "a bool mask (batch, length)")
    modules = dict(model.named_modules())
    if missing := [name for name in adapter.pairs if name not in modules]:
        raise KeyError(f"lora: the model has no layer {missing[0]!r}; the adapter was made for another one")

    def adapted(pair: Pair) -> Callable:
        def hook(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            changed = out + lowrank_delta(args[0], *pair, scale=adapter.scale)
            if mask is None:
                return changed
            if mask.shape != out.shape[:2]:
                check.fail("lora", f"mask {tuple(mask.shape)}", f"{tuple(out.shape[:2])}, one entry for each token")
            return torch.where(mask[..., None], changed, out)

        return hook

    hooks = [modules[name].register_forward_hook(adapted(pair)) for name, pair in adapter.pairs.items()]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def response_mask(prompt: Tensor, length: int) -> Tensor:
    """Which tokens go through an adapter that reads the base model's prompt, (B, length) bool.

    True from the last prompt token on, because the answer's first token is predicted from it.

    Args:
        prompt: (B,) int, tokens in each row's prompt, within [1, length].
    """
    check.shapes("response_mask", prompt=(prompt, "batch"))
    check.within("response_mask", 1, length, prompt=prompt)
    return torch.arange(length) >= prompt[:, None] - 1


def save_adapter(adapter: Adapter, path: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write an adapter as safetensors, by default in half the bytes."""
    from safetensors.torch import save_file

    tensors = {f"{name}.{part}": getattr(pair, part).detach().to(dtype).contiguous()
               for name, pair in adapter.pairs.items() for part in Pair._fields}  # fmt: skip
    save_file(tensors, Path(path), metadata={"scale": repr(adapter.scale)})


def load_adapter(content: bytes | str | Path) -> Adapter:
    """An adapter in float32 from a file or its bytes; nothing is unpickled.

    Raises:
        ValueError: a file that holds something else.
    """
    import json

    from safetensors.torch import load

    content = content if isinstance(content, bytes) else Path(content).read_bytes()
    tensors = {name: value.float() for name, value in load(content).items()}
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    names = sorted({name.rpartition(".")[0] for name in tensors})
    if not names or set(tensors) != {f"{n}.{part}" for n in names for part in Pair._fields} or "__metadata__" not in header:
        check.fail("load_adapter", f"{len(tensors)} tensors", "a and b of each layer and the scale", "use save_adapter")
    pairs = {name: Pair(tensors[f"{name}.a"], tensors[f"{name}.b"]) for name in names}
    return Adapter(pairs, float(header["__metadata__"]["scale"]))
