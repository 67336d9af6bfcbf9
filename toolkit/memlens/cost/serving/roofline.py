"""What a decode iteration takes on given devices, what must cross the link between two pools of them, and what a token costs.

    model        max(2·N·B / flops, e·N / bandwidth)              all that is not attention: weights are read once a batch
    attention    max(4·d·l·B·L / flops, 2·(d/G)·l·e·B·L / bandwidth)    keys and values of every request are read
    wire         (2 + 2/G)·e·d·B·L                                q and the output, k and v

N weights, B requests, l tokens of context, L layers, width d, G query heads for each kv head, e bytes a number. The model's
arithmetic intensity grows with B, attention's does not: that is why the two want different devices.
Source: arXiv:2405.01814, sections 2 and 3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from memlens import check
from memlens.cost.devices import Device, device
from memlens.cost.memory import Llama, kv_bytes, llama_weights

__all__ = [
    "LLAMA3_70B", "Pools", "Times", "cost_per_token", "min_bandwidth", "parameters", "roofline_times", "token_bytes",
    "wire_bytes",
]  # fmt: skip

LLAMA3_70B = Llama(8192, 28672, 80, 128256, 64, 8)


class Times(NamedTuple):
    model: float  # s for one iteration of the whole batch
    attention: float  # s, likewise


class Pools(NamedTuple):
    """Devices that serve one model: a homogeneous pool, or one for the model and one for attention."""

    model: tuple[str, int]  # a name of `memlens.cost.devices` and how many
    attention: tuple[str, int] | None = None  # None: the model's own devices attend
    batches: int = 2  # in flight with two pools: they take turns on them


def parameters(shape: Any) -> int:
    """Weights of a Llama-like model that a token multiplies with; the embedding table is looked up, not read."""
    return sum(weight.numel for weight in llama_weights(shape) if weight.name != "embed" or shape.tie_word_embeddings)


def token_bytes(shape: Any, number_bytes: float = 2) -> float:
    """Bytes of keys and values for each token of context, all layers."""
    return kv_bytes(shape, 1, itemsize=number_bytes)["payload"]


def wire_bytes(shape: Any, number_bytes: float = 2) -> float:
    """Bytes that cross between the pools for each token and layer: (2 + 2/G)·e·d."""
    group = shape.num_attention_heads / shape.num_key_value_heads
    return (2 + 2 / group) * number_bytes * shape.hidden_size


def roofline_times(
    shape: Any, batch: int, context: int, *, model: Device, attention: Device | None = None, number_bytes: float = 2
) -> Times:
    """Seconds of one decode iteration: everything but attention on `model`, attention on `attention` (default `model`).

    Args:
        shape: `memlens.cost.memory.Llama` or a transformers config.
        batch, context: requests, and tokens that each has in its cache.
    Raises:
        ValueError: a batch below 1 or a negative context.
    """
    check.at_least("roofline_times", 1, batch=batch)
    check.at_least("roofline_times", 0, context=context)
    attention, count = attention or model, parameters(shape)
    linear = max(2 * count * batch / model.flops, number_bytes * count / model.bandwidth)
    products = 4 * shape.hidden_size * shape.num_hidden_layers * batch * context
    read = token_bytes(shape, number_bytes) * batch * context
    return Times(linear, max(products / attention.flops, read / attention.bandwidth))


def min_bandwidth(
    shape: Any, batch: int, context: int, *, model: Device, attention: Device, slack: float = 0.2, number_bytes: float = 2
) -> float:
    """Bytes a second that the link needs so that what it carries adds at most the share `slack` to an iteration.

    (2 + 2/G)·e·d·B·L / (slack·(model + attention)); it falls with G and with 1/slack.

    Raises:
        ValueError: a slack that is not positive, or as `roofline_times`.
    """
    if not slack > 0:
        check.fail("min_bandwidth", f"slack={slack}", "a positive share of the iteration")
    times = roofline_times(shape, batch, context, model=model, attention=attention, number_bytes=number_bytes)
    return wire_bytes(shape, number_bytes) * batch * shape.num_hidden_layers / (slack * sum(times))


def cost_per_token(
    config: Pools, prices: dict[str, float] | None = None, *, shape: Any, context: int, usable: float = 0.9,
    number_bytes: float = 2, most: int = 1024,
) -> float:  # fmt: skip
    """Dollars for a generated token at the largest batch that fits, infinite where none does.

    One pool takes model + attention for each iteration. With two pools `batches` groups of requests take turns, so that an
    iteration of all of them takes batches·max(model, attention) of one group (links are taken to be fast enough).

    Args:
        config: the devices.
        prices: $/h by device name; default those of `memlens.cost.devices`.
        usable: share of the memory that weights and caches may take.
        most: no more requests than this.
    Raises:
        ValueError: an unknown device, fewer than 2 batches for two pools, or as `roofline_times`.
    """
    check.within("cost_per_token", 0, 1, usable=usable)
    pools = [device(name).times(count) for name, count in _parts(config)]
    room = usable * pools[0].memory - number_bytes * parameters(shape)
    cache = room if len(pools) == 1 else usable * pools[1].memory
    batch = min(most, int(cache // (token_bytes(shape, number_bytes) * context))) if room > 0 and context else 0
    groups = 1 if len(pools) == 1 else config.batches
    check.at_least("cost_per_token", 1 if len(pools) == 1 else 2, batches=groups)
    if batch < groups:
        return float("inf")
    times = roofline_times(shape, batch // groups, context, model=pools[0], attention=pools[-1], number_bytes=number_bytes)
    seconds = sum(times) if len(pools) == 1 else groups * max(times)
    return seconds * _rate(config, prices) / (batch // groups * groups)


def _rate(config: Pools, prices: dict[str, float] | None) -> float:
    """Dollars a second."""
    return sum(count * (prices[name] if prices else device(name).price) for name, count in _parts(config)) / 3600


def _parts(config: Pools) -> list[tuple[str, int]]:
    return [pool for pool in (config.model, config.attention) if pool]
