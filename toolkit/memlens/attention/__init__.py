"""Attention: exact, merged from parts, masked, sparse, and rotary positions."""

from importlib import import_module

_HOMES = {
    "Attended": "merge", "attend": "exact", "attention_io": "io", "block_attend": "sparse", "merge_many": "merge",
    "mix_heads": "masks", "prefix_attend": "prefix", "stream_mask": "masks", "shift": "rope", "unrope": "rope",
}  # fmt: skip
__all__ = [
    "Attended", "attend", "attention_io", "block_attend", "merge_many", "mix_heads", "prefix_attend", "shift",
    "stream_mask", "unrope",
]  # fmt: skip


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
