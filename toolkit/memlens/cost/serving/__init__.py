"""Serving arithmetic: what an iteration takes, how two kinds of device share it, and what a batch of prompts has in common."""

from memlens.lazy import attach

_HOMES = {
    "LLAMA3_70B": "roofline", "Pools": "roofline", "cost_per_token": "roofline", "token_bytes": "roofline",
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
__all__, __getattr__, __dir__ = attach(__name__, _HOMES)
