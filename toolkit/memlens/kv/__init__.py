"""The KV cache, compressed: score, budget, select, store, attend. A paper is a preset over these steps.

The parts that need transformers (`cache`, `adapter`) load on first use.
"""

from memlens.lazy import attach

_HOMES = {
    "column_mass": "score", "smooth": "score", "surprisal": "score", "hit_rate": "score", "retained_mass": "score",
    "gumbel_mass": "score", "persistence_ratio": "score", "retaining_scores": "score",
    "Observed": "observe", "decode_observe": "observe",
    "topk_keep": "select", "gather_kv": "select", "complement": "select", "StreamState": "select",
    "fixed_point": "select", "merge_into": "merge", "merge_kv": "merge", "nearest_by_cosine": "merge",
    "nearest_by_position": "merge",
    "Policy": "policies", "full": "policies", "h2o": "policies", "random_keep": "policies", "snapkv": "policies",
    "streaming": "policies", "tova": "policies", "scissorhands": "policies", "keyformer": "policies", "sirllm": "policies",
    "advise": "advice",
    "by_head": "head_split",
    "PolicyCache": "cache", "compress": "cache", "continue_with": "cache", "prefill": "cache", "stream_eval": "cache",
}  # fmt: skip
_MODULES = (
    "adapter", "advice", "budget", "cache", "channels", "d2o", "elastic", "head_split", "kivi", "ksort", "locret", "lowrank", "merge",
    "mikv", "observe",
    "packed", "plan", "policies", "policy", "prefixkv", "quantize", "retrieval", "score", "select", "storage", "store",
    "think",
)  # fmt: skip
__all__, __getattr__, __dir__ = attach(__name__, _HOMES, _MODULES)
