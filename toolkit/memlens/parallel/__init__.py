"""Real processes on one machine: attention in other processes than the model."""

from importlib import import_module

_HOMES = {
    "AttentionPool": "attention_pool", "Comm": "comm", "CommEvent": "comm", "RemoteCache": "attention_pool",
    "attention_offload": "attention_pool", "hire": "processes",
}  # fmt: skip
__all__ = ["AttentionPool", "Comm", "CommEvent", "RemoteCache", "attention_offload", "hire"]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
