"""What memory a model needs: bytes of recurrent state and of caches, of optimizer state.

Every function counts bytes of one sequence or one model from sizes alone; nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from memlens import check
from memlens.memory.features import feature_count
from memlens.memory.hybrid import KINDS, MixerSpec

__all__ = ["LLAMA_7B", "Llama", "Weight", "kv_bytes", "llama_weights", "optimizer_bytes", "state_bytes", "training_bytes"]


def state_bytes(spec: MixerSpec | Sequence[MixerSpec], length: int, *, cache_bytes: int = 4) -> int:
    """Bytes one sequence carries from token to token after `length` tokens, summed over the layers.

        softmax  2·length·d            the keys and values
        window   2·min(window, length)·d
        linear   heads·F·(d/heads + 1) the state and its normaliser, F = 1 + f + f(f + 1)/2
        mamba    expand·d·states       plus the short convolution
        conv     (kernel - 1)·channels for each convolved stream: q, k and v, or the one stream of conv and mamba

    Args:
        spec: one layer or a list of them.
        length: tokens seen, at least 0.
        cache_bytes: of one cached number (keys, values, convolution inputs). States are float32 always, 4 bytes.
    Raises:
        ValueError: an unknown kind, a negative length.
    Source: arXiv:2402.18668, section 5; the convolution inputs are counted here and not there.
    """
    if not isinstance(spec, MixerSpec):
        return sum(state_bytes(layer, length, cache_bytes=cache_bytes) for layer in spec)
    check.one_of("state_bytes", KINDS, kind=spec.kind)
    check.at_least("state_bytes", 0, length=length)
    check.at_least("state_bytes", 1, d=spec.d, heads=spec.heads, cache_bytes=cache_bytes)
    taps = max(0, spec.kernel - 1) * cache_bytes
    wide = spec.expand * spec.d
    if spec.kind == "mamba":
        return wide * spec.states * 4 + taps * wide
    if spec.kind == "conv":
        return taps * wide
    if spec.kind == "linear":
        features = spec.heads * feature_count(spec.feature_dim) * (spec.d // spec.heads + 1)
        return features * 4 + taps * (2 * spec.heads * spec.feature_dim + spec.d)
    kept = length if spec.kind == "softmax" else min(spec.window, length)
    return 2 * kept * spec.d * cache_bytes + 3 * taps * spec.d


class Llama(NamedTuple):
    """Sizes of a Llama-type decoder, under the names of a Hugging Face config (which serves as well)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool = False


LLAMA_7B = Llama(4096, 11008, 32, 32000, 32, 32)


def kv_bytes(config: Any, length: int, *, batch: int = 1, store: Any = None, itemsize: int = 2) -> dict[str, int]:
    """Bytes of the keys and values of `length` held tokens, all layers, by part; without a format all is "payload":

        2 · layers · batch · kv_heads · length · dim · itemsize

    Args:
        config: `Llama`, or a transformers config with the same fields.
        length: tokens held by each kv head, at least 0.
        store: a format of `memlens.kv.storage`, e.g. `kivi(4)`; its own `size` counts codes, scales, indices and rests.
        itemsize: bytes of one plain number.
    Raises:
        ValueError: a negative length, a batch or itemsize below 1, what the format refuses.
    Source: arXiv:2603.20397, the size law 2·H_kv·D·bytes·layers a token.
    """
    check.at_least("kv_bytes", 0, length=length)
    check.at_least("kv_bytes", 1, batch=batch, itemsize=itemsize)
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if store is None:
        return {"payload": 2 * layers * batch * heads * length * dim * itemsize}
    shape, total = (batch, heads, length, dim), {}
    for layer in range(layers):
        for part, size in store.at(layer).size(shape, itemsize).items():
            total[part] = total.get(part, 0) + size
    return total


class Weight(NamedTuple):
    name: str
    shape: tuple[int, ...]
    count: int  # weights of this name in the model
    low_rank: bool  # a matrix of attention or MLP, which the low-rank methods compress

    @property
    def numel(self) -> int:
        """Elements of all of them."""
        return self.count * self.shape[0] * (self.shape[1] if len(self.shape) > 1 else 1)


def llama_weights(config: Any) -> list[Weight]:
    """The trainable weights of a Llama-type decoder by name, as (out, in) matrices and vectors; a tied head is not listed.

    Args:
        config: `Llama`, or a transformers config with the same fields.
    Raises:
        ValueError: heads that do not divide.
    """
    d, inter, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    check.divides("llama_weights", heads=heads, hidden_size=d)
    check.divides("llama_weights", kv_heads=kv_heads, heads=heads)
    narrow = d // heads * kv_heads
    shapes = {
        "q": (d, d),
        "k": (narrow, d),
        "v": (narrow, d),
        "o": (d, d),
        "gate": (inter, d),
        "up": (inter, d),
        "down": (d, inter),
    }
    found = [Weight(name, shape, layers, True) for name, shape in shapes.items()]
    ends = ["embed"] if config.tie_word_embeddings else ["embed", "head"]
    found += [Weight(name, (config.vocab_size, d), 1, False) for name in ends]
    return [*found, Weight("norm", (d,), 2 * layers + 1, False)]


# elements of (projector, moments) for one matrix: short side s, long side l, rank r; source: arXiv:2403.03507, table 1
_KEPT = {
    "sgd": lambda s, l, r: (0, s * l),  # one momentum
    "adam": lambda s, l, r: (0, 2 * s * l),
    "lora": lambda s, l, r: (0, 2 * (s + l) * r),
    "galore": lambda s, l, r: (s * r, 2 * l * r),
}


def optimizer_bytes(
    config: Any, method: str, *, rank: int | None = None, moment_bytes: float = 4, projector_bytes: float = 4
) -> dict[str, int]:
    """Bytes of optimizer state by part: projectors, their moments, and moments of the weights that no method compresses.

    Args:
        config: `Llama`, a transformers config, or a list of `Weight`.
        method: "sgd" (with momentum), "adam", "lora" or "galore". Embeddings, head and norms keep sgd's or Adam's moments.
        rank: of "lora" and "galore", capped at each matrix's short side.
        moment_bytes: of one number: 4, 2, or 1 + 4 / 256 for dyn8 with its block maxima.
        projector_bytes: of one number of a projector; only galore has them.
    Returns:
        {"projector", "low_rank", "full"}: moments of what is compressed are "low_rank", all other moments "full".
    Raises:
        ValueError: an unknown method, or no rank where one is needed.
    """
    check.one_of("optimizer_bytes", _KEPT, method=method)
    if (rank is None) is (method in ("lora", "galore")):
        check.fail("optimizer_bytes", f"method={method!r}, rank={rank}", "a rank for lora and galore, and only for them")
    check.at_least("optimizer_bytes", 1, rank=1 if rank is None else rank)
    total = dict.fromkeys(("projector", "low_rank", "full"), 0)
    for weight in config if isinstance(config, list) else llama_weights(config):
        compressed = weight.low_rank and rank is not None
        kept = _KEPT[method if compressed else "sgd" if method == "sgd" else "adam"]
        short, long = (min(weight.shape), max(weight.shape)) if len(weight.shape) > 1 else (1, weight.shape[0])
        projector, moments = kept(short, long, min(rank or short, short))
        total["projector"] += round(weight.count * projector * projector_bytes)
        total["low_rank" if compressed else "full"] += round(weight.count * moments * moment_bytes)
    return total


def training_bytes(
    config: Any, method: str, *, weight_bytes: float = 2, gradient_bytes: float = 2, layerwise: bool = False,
    activations: int = 0, **options,
) -> dict[str, int]:  # fmt: skip
    """Bytes of training by part: weights, gradients, activations, and the parts of `optimizer_bytes`.

    Args:
        config, method, options: as `optimizer_bytes`.
        weight_bytes, gradient_bytes: of one number.
        layerwise: update each weight inside backward and free its gradient: at most one is alive, so the largest counts.
        activations: bytes, as measured or taken from elsewhere.
    Raises:
        ValueError: as `optimizer_bytes`.
    """
    weights = config if isinstance(config, list) else llama_weights(config)
    state = optimizer_bytes(weights, method, **options)
    everything = sum(weight.numel for weight in weights)
    alive = max(weight.numel // weight.count for weight in weights) if layerwise else everything
    weight, gradient = round(everything * weight_bytes), round(alive * gradient_bytes)
    return {"weights": weight, "gradients": gradient, "activations": activations, **state}
