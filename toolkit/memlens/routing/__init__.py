"""Mixtures of experts as a memory question: which experts a text needs, in what order, and what a cache of them saves."""

from memlens.lazy import attach

_HOMES = {
    "RoutingTrace": "trace", "record": "trace", "moefy": "oracle", "join": "trace", "reroute": "trace", "shipped": "trace",
    "topk_gate": "gate", "load_balance": "gate", "mix_experts": "gate",
    "segment_counts": "consistency", "srp": "consistency", "srp_floor": "consistency", "sch": "consistency",
    "shuffle_control": "consistency", "srp_controlled": "consistency", "expert_specialization": "consistency",
    "Switcher": "switcher", "chunk_means": "switcher", "decide": "switcher", "smooth": "switcher", "train_switcher": "switcher",
    "hit_curve": "caching", "simulate": "caching",
}  # fmt: skip
__all__, __getattr__, __dir__ = attach(__name__, _HOMES)
