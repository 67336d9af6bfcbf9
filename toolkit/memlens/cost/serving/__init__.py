"""Serving arithmetic: what an iteration takes, how two kinds of device share it, and what a batch of prompts has in common."""

from importlib import import_module

_HOMES = {
    "LLAMA3_70B": "roofline", "Plan": "roofline", "cost_per_token": "roofline", "kv_bytes": "roofline",
    "min_bandwidth": "roofline", "parameters": "roofline", "roofline_times": "roofline", "wire_bytes": "roofline",
    "break_even": "economics", "expected_latency": "economics",
    "replica": "staggered", "staggered_schedule": "staggered",
    "Hybrid": "hybrid_trace", "STRATEGIES": "hybrid", "apex_threshold": "hybrid", "hybrid_throughput": "hybrid",
    "prefers_pipelining": "hybrid", "HYBRIDS": "hybrid_trace", "Job": "hybrid_trace", "simulate_hybrid": "hybrid_trace",
    "Node": "prefix", "prefix_tree": "prefix", "shareable": "prefix",
    "Group": "grouping", "order_groups": "grouping", "saved_tokens": "grouping", "single_level": "grouping",
    "BATCHLLM": "batching", "LRU": "batching", "Batching": "batching", "Request": "batching",
    "simulate_batching": "batching",
}  # fmt: skip
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
