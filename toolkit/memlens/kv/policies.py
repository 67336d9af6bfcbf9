"""Which tokens a cache keeps: a policy is a score, a budget, the protected ends and a moment, and a paper is one of them.

    policy = h2o(heavy=51, recent=51)
    state = policy.init(config, layers=30)
    state = policy.observe(state, layer, q, k, v, q_start, lse)      # after each forward of each layer
    idx = policy.plan(state, layer, k.shape[2])                      # which tokens stay, or None for all
    state, kept = policy.fold(state, layer, k, v, idx, inv_freq)     # kept k and v with the others merged in, or None
    state = policy.took(state, layer, idx)                           # once k and v were gathered at idx

Two policies that differ by a score differ by a score: `h2o(51, 51)._replace(first=4)` is H2O with four sinks. They compose:

    snapkv(128).stored(kivi(4))                                      with a way to hold what stays (`memlens.kv.storage`)
    by_head(retrieval, mikv(0.2), streaming(68))                     with another policy for the other heads (`memlens.kv.head_split`)

The cache in `memlens.kv.cache` runs this protocol inside a model.
"""

from __future__ import annotations

from functools import partial

import torch

from memlens import check
from memlens.kv import eviction
from memlens.kv.d2o import d2o
from memlens.kv.elastic import elastic
from memlens.kv.locret import locret
from memlens.kv.policy import Block, LayerState, Policy, no_score, nothing
from memlens.kv.prefixkv import prefixkv
from memlens.kv.score import column_mass, group_heads, smooth
from memlens.kv.select import extend

__all__ = [
    "Block", "LayerState", "Policy", "d2o", "elastic", "full", "h2o", "keyformer", "locret", "prefixkv", "random_keep", "scissorhands",
    "sirllm", "snapkv", "streaming", "tova",
]  # fmt: skip


# --- scores: (state of a layer, block) -> state of the layer -------------------------------------------------------


def recency(state: LayerState, block: Block) -> LayerState:
    """A token is worth its position: the newest stay."""
    after = extend(state.stream, nothing(block), pad=block.pad)
    return state._replace(stream=after._replace(score=after.pos.float()))


def accumulated(state: LayerState, block: Block, *, group: str) -> LayerState:
    """A token is worth all the attention that it got while it was held, summed over rows."""
    before, kv_heads = state.stream, block.k.shape[1]
    per_head = group == "max"  # a maximum of sums needs each query head's own sum
    if block.mass is not None:
        mass = group_heads(block.mass, kv_heads, "none" if per_head else group)
    else:
        seen = {"q_start": block.q_start, "alive": block.alive, "scale": block.scale}
        mass = column_mass(block.q, block.k, lse=block.lse, group="none" if per_head else group, **seen)
    if not per_head:
        return state._replace(stream=extend(before, mass, pad=block.pad))
    sums = mass.unflatten(1, (kv_heads, -1))  # (B, Hkv, g, L)
    if "heads" in before.aux:
        sums[..., : before.score.shape[-1]] += before.aux["heads"]
    after = extend(before._replace(aux={"heads": sums}), nothing(block), pad=block.pad)
    return state._replace(stream=after._replace(score=sums.amax(2)))


def observed(state: LayerState, block: Block, *, window: int, kernel: int, pool: str, group: str) -> LayerState:
    """A token is worth the attention of the last `window` rows, pooled with its neighbours. The rows may span blocks."""
    q = block.q if state.memory is None else torch.cat((state.memory, block.q), 2)
    q, length = q[:, :, -window:], block.k.shape[2]
    mass = column_mass(q, block.k, group=group, alive=block.alive, scale=block.scale)
    before = max(0, length - window)  # the window's own columns are kept anyway and must not leak into the pool
    score = torch.cat((smooth(mass[..., :before], kernel, pool), mass[..., before:]), -1)
    after = extend(state.stream, nothing(block), pad=block.pad)
    return state._replace(stream=after._replace(score=score), memory=q.clone())


def last_row(state: LayerState, block: Block) -> LayerState:
    """A token is worth what the newest row gives it, averaged over all heads."""
    if block.mass is not None:
        mass = group_heads(block.mass, block.k.shape[1], "mean")
    else:
        mass = column_mass(block.q, block.k, reduce="last", alive=block.alive, scale=block.scale)
    after = extend(state.stream, nothing(block), pad=block.pad)
    return state._replace(stream=after._replace(score=mass.mean(1, keepdim=True).expand_as(mass).contiguous()))


def drawn(state: LayerState, block: Block, *, generator: torch.Generator) -> LayerState:
    """A token is worth a number drawn when it arrives."""
    shape = (*block.k.shape[:2], block.q.shape[2])
    draw = torch.rand(shape, generator=generator, device=generator.device).to(block.k.device)
    score = torch.cat((torch.zeros_like(state.stream.score), draw), -1)
    return state._replace(stream=extend(state.stream, score, pad=block.pad))


# --- presets -------------------------------------------------------------------------------------------------------


def full() -> Policy:
    """Keep everything."""
    return Policy("full", no_score, looks=False)


def streaming(budget: int, *, sinks: int = 4) -> Policy:
    """The first `sinks` tokens and the newest ones, the rest of the budget. Source: arXiv:2309.17453.

    Raises:
        ValueError: budget <= sinks.
    """
    check.at_least("streaming", sinks + 1, f"the {sinks} sinks count inside it", budget=budget)
    return Policy("streaming", recency, budget, first=sinks, last=budget - sinks, looks=False)


def random_keep(budget: int, *, generator: torch.Generator, sinks: int = 4, recent: int = 0) -> Policy:
    """The sinks, the recent tokens and a random choice of the others: what any score must beat."""
    return Policy("random", partial(drawn, generator=generator), budget, first=sinks, last=recent, looks=False)


def tova(budget: int) -> Policy:
    """The tokens that the newest row attends to most, one choice for all heads of a layer. Source: arXiv:2401.06104."""
    return Policy("tova", last_row, budget, tallies=True)


def h2o(heavy: int, recent: int, *, group: str = "mean", rolling: bool = False) -> Policy:
    """H2O: the `recent` newest tokens and, of the others, the `heavy` with the most attention so far.

    The sum runs over every row since the token came; what was evicted is forgotten. The paper takes heavy = recent.

    Args:
        heavy, recent: tokens per (layer, kv head); the budget is their sum.
        group: how the query heads of a kv head share one score: "mean", "max" or "sum".
        rolling: attend as if the kept tokens stood next to each other, for streams longer than the trained length.
    Raises:
        ValueError: negative counts, or heavy + recent = 0.
    Source: arXiv:2306.14048, algorithm 1; its code sums a batch into one score and repeats kv heads, this does neither.
    """
    check.at_least("h2o", 0, heavy=heavy, recent=recent)
    check.at_least("h2o", 1, "keep at least one token", budget=heavy + recent)
    return Policy("h2o", partial(accumulated, group=group), heavy + recent, last=recent, rolling=rolling, tallies=True)


def snapkv(capacity: int, *, window: int = 32, kernel: int = 7, pool: str = "max", group: str = "mean") -> Policy:
    """SnapKV: at the end of the prompt, the last `window` tokens and what they attend to, pooled; nothing goes later.

    Args:
        capacity: tokens per (layer, kv head), window included.
        window: newest rows whose attention counts; they are kept.
        kernel, pool: width (odd) and kind ("max", "avg") of the pooling; kernel=1 is none.
        group: how the query heads of a kv head share one score.
    Raises:
        ValueError: capacity <= window, window < 1, an even kernel, an unknown pool.
    Source: arXiv:2404.14469, section 4; its code chooses per query head and stores repeated kv heads, this stores kv heads.
    """
    check.at_least("snapkv", 1, window=window)
    check.at_least("snapkv", window + 1, f"the window of {window} counts inside it", capacity=capacity)
    smooth(torch.zeros(1), kernel, pool)
    score = partial(observed, window=window, kernel=kernel, pool=pool, group=group)
    return Policy("snapkv", score, capacity, last=window, when="prompt")


def scissorhands(budget: int, *, window: int = 400, recent: int = 10, drop: float = 0.5) -> Policy:
    """Scissorhands: when the budget is full, the tokens most often below uniform attention of late go, many at once.

    A cache that overflows shrinks to budget + 1 - m tokens, m = drop · budget, so that one step in m compresses.

    Args:
        budget: most tokens per (layer, kv head) after a forward.
        window: rows that are looked back on, at most 16,384; the oldest leave in steps of a sixteenth.
        recent: newest tokens that are kept whatever their record.
        drop: share of the budget given up at once, in [0, 1); at least one token.
    Raises:
        ValueError: recent >= budget - m, a window or drop outside.
    Source: arXiv:2305.17118, algorithm 2; its code masks by row instead and frees nothing.
    """
    check.at_least("scissorhands", 1, budget=budget)
    check.within("scissorhands", 1, 1 << 14, window=window)
    check.within("scissorhands", 0.0, 1.0 - 1e-9, drop=drop)
    many = max(1, int(drop * budget))
    check.at_least("scissorhands", recent + many + 1, f"recent={recent} must survive a drop of {many}", budget=budget)
    score = partial(eviction.least_below, window=window)
    return Policy("scissorhands", score, budget, last=recent, slack=many - 1)


def keyformer(
    budget: int, *, generator: torch.Generator, recent: float = 0.3, tau_init: float = 1.0, tau_delta: float = 0.01,
    noise: float = 1.0, group: str = "mean",
) -> Policy:  # fmt: skip
    """Keyformer: H2O with another sum, that of a softmax with Gumbel noise and a temperature that rises while writing.

    Args:
        budget: tokens per (layer, kv head); the paper takes 0.5 to 0.6 of the prompt (`kv.budget.tokens`).
        generator: of the noise.
        recent: share of the budget for the newest tokens.
        tau_init, tau_delta: temperature in the first forward, and its rise with each row after it. The paper goes from 1
            to 2 over the tokens it generates.
        noise: times the Gumbel draw; 0 is none, and with tau_delta = 0 then H2O.
        group: how the query heads of a kv head share one score: "mean" or "sum".
    Raises:
        ValueError: budget < 1, recent outside [0, 1], tau_init <= 0, tau_delta < 0, noise < 0.
    Source: arXiv:2403.09054, section 3; its code sums a batch into one score and frees nothing.
    """
    check.at_least("keyformer", 1, budget=budget)
    check.within("keyformer", 0.0, 1.0, recent=recent)
    check.one_of("keyformer", ("mean", "sum"), group=group)
    if tau_init <= 0:
        check.fail("keyformer", f"tau_init={tau_init}", "tau_init > 0", "a temperature divides the scores")
    check.within("keyformer", 0.0, torch.inf, tau_delta=tau_delta, noise=noise)
    options = {"generator": generator, "noise": noise, "tau_init": tau_init, "tau_delta": tau_delta, "group": group}
    return Policy("keyformer", partial(eviction.noisy, **options), budget, last=round(recent * budget))


def sirllm(*, start: int = 4, entropy: int = 1020, recent: int = 0, decay: float = 1.0, rolling: bool = True) -> Policy:
    """SirLLM: the first tokens, the newest, and of the others those that the model had expected least.

    The score of a token is its surprisal -log P(token | before), one number for all layers and heads.

    Args:
        start, entropy, recent: tokens of the three kinds; the budget is their sum.
        decay: what an eviction leaves of every kept score, in (0, 1]: below 1 old memories fade.
        rolling: attend as if the kept tokens stood next to each other, so that a stream has no end.
    Raises:
        ValueError: negative counts, a budget of 0, decay outside.
    Source: arXiv:2405.12528, section 3; its code takes each token's logits one place too late, this does not.
    """
    check.at_least("sirllm", 0, start=start, entropy=entropy, recent=recent)
    check.at_least("sirllm", 1, "keep at least one token", budget=start + entropy + recent)
    check.within("sirllm", 1e-9, 1.0, decay=decay)
    score, budget = partial(eviction.unexpected, decay=decay), start + entropy + recent
    return Policy("sirllm", score, budget, first=start, last=recent, rolling=rolling, hears=True, looks=False)
