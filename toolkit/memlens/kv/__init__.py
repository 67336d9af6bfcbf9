"""The KV cache, compressed: score, budget, select, store, attend. A paper is a preset over these steps.

The parts that need transformers (`cache`, `adapter`) load on first use.
"""

from importlib import import_module

_HOMES = {
    "column_mass": "score", "smooth": "score", "surprisal": "score", "hit_rate": "score", "retained_mass": "score",
    "gumbel_mass": "score", "persistence_ratio": "score",
    "topk_keep": "select", "gather_kv": "select", "complement": "select", "StreamState": "select",
    "Policy": "policies", "full": "policies", "h2o": "policies", "random_keep": "policies", "snapkv": "policies",
    "streaming": "policies", "tova": "policies", "scissorhands": "policies", "keyformer": "policies", "sirllm": "policies",
    "PolicyCache": "cache", "compress": "cache", "continue_with": "cache", "prefill": "cache", "stream_eval": "cache",
}  # fmt: skip
_MODULES = (
    "adapter", "budget", "cache", "kivi", "ksort", "mikv", "packed", "policies", "quantize", "score", "select", "storage", "store",
)  # fmt: skip
__all__ = [name for names in (_HOMES, _MODULES) for name in names]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
