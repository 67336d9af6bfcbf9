"""Where in a KV cache's life a method acts: the one table of it, by the key of the paper.

    generation     making it: fewer prompt tokens or cheaper attention while it is filled
    compression    what is held of it: eviction, merging, fewer bits, lower rank, fewer channels
    retrieval      finding a cache that is there already: a shared prefix, a session's context
    loading        bringing it to the attention: fetching a part, moving it, attending where it lies

A paper that leaves the cache alone has no stage. Source: SCBench, arXiv:2412.10319, section 2, whose four stages these are.
"""

from __future__ import annotations

from typing import Any

from memlens import check

__all__ = ["BASELINES", "LIFECYCLE", "STAGES", "stages"]

STAGES = ("generation", "compression", "retrieval", "loading")

LIFECYCLE: dict[str, tuple[str, ...]] = {  # every kv paper of the catalogue
    "h2o": ("compression",),
    "scissorhands": ("compression",),
    "keyformer": ("compression",),
    "snapkv": ("compression",),
    "sirllm": ("compression",),
    "locret": ("generation", "compression"),  # evicts between the chunks of a prefill
    "prefixkv": ("compression",),
    "d2o": ("compression",),
    "elasticcache": ("compression",),
    "think": ("compression",),
    "kivi": ("compression",),
    "mikv": ("compression",),
    "ksort": ("compression",),
    "shadowkv": ("compression", "loading"),  # keys of low rank; chunks fetched at every step
    "instinfer": ("loading",),
    "scbench": (),
    "lamina": ("loading",),
    "apex_hybrid": ("loading",),
    "batchllm": ("generation", "retrieval"),  # a shared prefix is computed once and found again
    "iccache": (),
    "categorycache": (),
    "edgereasoning": ("retrieval",),  # adapters that leave the prompt's cache valid in both modes
    "kvstrategies": (),
    "kvsurvey": (),
}
BASELINES: dict[str, tuple[str, ...]] = {  # presets and formats that no paper of the catalogue stands behind
    "full": (),
    "plain": (),
    "streaming": ("compression",),
    "random": ("compression",),
    "tova": ("compression",),
    "low_rank": ("compression",),
}
_PAPER = {"elastic": "elasticcache", "block_floats": "ksort"}  # where a policy or format is not named as its paper


def stages(policy: Any) -> tuple[str, ...]:
    """The stages in which a policy of `memlens.kv.policies`, or a storage format, acts, in the order of STAGES.

    A policy with a format has the stages of both.

    Raises:
        ValueError: a name that the table lacks.
    """
    found = {stage for part in (policy, getattr(policy, "store", None)) if part is not None for stage in _row(part.name)}
    return tuple(stage for stage in STAGES if stage in found)


def _row(name: str) -> tuple[str, ...]:
    table = LIFECYCLE | BASELINES
    key = _PAPER.get(name, name)
    check.one_of("stages", table, name=key)
    return table[key]
