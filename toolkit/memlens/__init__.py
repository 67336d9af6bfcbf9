"""memlens: building blocks and notebooks for the memory of language models.

Importing the package loads nothing else; `memlens.kv`, `memlens.attention` and the others load on first use.
"""

from memlens.lazy import attach

__version__ = "0.1.0"
_PARTS = (
    "attention", "backend", "bench", "book", "catalog", "check", "cost", "data", "files", "kv", "layout", "lazy", "memory", "models",
    "optim", "parallel", "quant", "recall", "routing", "tasks", "viz",
)  # fmt: skip
__all__, __getattr__, __dir__ = attach(__name__, {}, _PARTS)
