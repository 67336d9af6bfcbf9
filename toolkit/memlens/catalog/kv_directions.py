"""What each KV-cache method does, in the words of a survey: its direction, what it loses, what memory it needs.

The five directions are those of arXiv:2603.20397; its tables were not read, so where a method stands is our reading of the
method, and the same methods have a leaf in `catalog.kv_taxonomy`.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DIRECTIONS", "EFFECTS", "SITUATIONS", "Direction", "kv_directions"]

DIRECTIONS = ("eviction", "compression", "hybrid memory", "new attention", "combination")
EFFECTS = ("less", "same", "more")  # work or traffic, against the full cache

# The survey has seven; these five are named in its abstract.
SITUATIONS = (
    "one long request", "data centre, high throughput", "edge device", "conversation of several turns",
    "reasoning where accuracy is critical",
)  # fmt: skip


class Direction(NamedTuple):
    direction: str
    lossless: bool  # the output is that of the full cache
    linear: bool  # the memory that holds the cache grows with the context
    training: bool  # something must be trained beforehand
    prefill: str  # its effect on the prompt's work
    decode: str  # its effect on what a written token reads and computes


def _all(direction: str, lossless: bool, linear: bool, training: bool, prefill: str, decode: str, *keys: str) -> dict:
    return dict.fromkeys(keys, Direction(direction, lossless, linear, training, prefill, decode))


kv_directions: dict[str, Direction] = {
    **_all("eviction", False, False, False, "more", "less", "h2o", "scissorhands", "keyformer", "snapkv", "tova"),
    **_all("eviction", False, False, False, "same", "less", "sirllm", "streaming"),
    **_all("eviction", False, False, True, "less", "less", "locret"),  # the prompt itself is read with a bounded cache
    **_all("eviction", False, True, False, "more", "less", "prefixkv"),  # shares of what was seen
    **_all("compression", False, True, False, "more", "less", "d2o", "elasticcache", "kivi", "mikv", "think"),
    **_all("compression", False, True, False, "same", "less", "ksort"),  # the order is folded into the weights
    **_all("hybrid memory", True, True, False, "same", "same", "lamina", "apex_hybrid"),
    **_all("hybrid memory", True, True, False, "less", "less", "batchllm"),
    **_all("hybrid memory", True, True, True, "less", "same", "edgereasoning"),
    **_all("hybrid memory", False, True, True, "less", "less", "iccache"),
    **_all("hybrid memory", False, True, False, "less", "less", "categorycache"),
    **_all("new attention", True, True, False, "less", "same", "flashattention"),
    **_all("new attention", False, False, True, "less", "less", "based"),
    **_all("combination", False, True, False, "more", "less", "shadowkv", "instinfer"),
}
