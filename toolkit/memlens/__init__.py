"""memlens: building blocks and notebooks for the memory of language models.

Importing the package loads nothing else; `memlens.kv`, `memlens.attention` and the others load on first use.
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = [
    "attention", "backend", "bench", "book", "catalog", "check", "cost", "data", "kv", "layout", "memory", "models",
    "optim", "parallel", "quant", "recall", "routing", "tasks", "viz",
]  # fmt: skip


def __getattr__(name: str):
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its parts are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
