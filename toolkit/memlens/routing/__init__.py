"""Mixtures of experts as a memory question: which experts a text needs, in what order, and what a cache of them saves."""

from importlib import import_module

_HOMES = {
    "RoutingTrace": "trace", "record": "trace", "moefy": "oracle", "join": "trace", "reroute": "trace", "shipped": "trace",
    "topk_gate": "gate", "load_balance": "gate", "mix_experts": "gate",
    "segment_counts": "consistency", "srp": "consistency", "srp_floor": "consistency", "sch": "consistency",
    "shuffle_control": "consistency", "srp_controlled": "consistency", "expert_specialization": "consistency",
    "Switcher": "switcher", "chunk_means": "switcher", "decide": "switcher", "smooth": "switcher", "train_switcher": "switcher",
    "hit_curve": "caching", "simulate": "caching",
}  # fmt: skip
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
