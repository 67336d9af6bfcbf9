"""Attention: exact, merged from parts, masked, sparse, and rotary positions."""

from memlens.lazy import attach

_HOMES = {
    "Attended": "merge", "attend": "exact", "attention_io": "io", "block_attend": "sparse", "merge_many": "merge",
    "mix_heads": "masks", "prefix_attend": "prefix", "stream_mask": "masks", "shift": "rope", "unrope": "rope",
}  # fmt: skip
__all__, __getattr__, __dir__ = attach(__name__, _HOMES)
