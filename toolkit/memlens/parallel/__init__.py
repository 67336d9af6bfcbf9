"""Real processes on one machine: attention in other processes than the model."""

from memlens.lazy import attach

_HOMES = {
    "AttentionPool": "attention_pool", "Comm": "comm", "CommEvent": "comm", "RemoteCache": "attention_pool",
    "attention_offload": "attention_pool", "hire": "processes",
}  # fmt: skip
__all__, __getattr__, __dir__ = attach(__name__, _HOMES)
