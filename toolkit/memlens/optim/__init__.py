"""Optimizer state: low-rank views of the gradient, coded moments, and the optimizers made of them."""

from memlens.lazy import attach

_HOMES = {
    "Subspace": "projection", "pick_side": "projection", "svd_subspace": "projection", "gauss_subspace": "projection",
    "energy_rank": "projection",    "project": "projection", "unproject": "projection", "add_unprojected_": "projection",
    "Moments": "moments", "adam_direction": "moments", "bias_correction": "moments", "norm_growth_limit": "moments",
    "reset_moments": "moments",
    "Codec": "lowbit", "CodedMoments": "lowbit", "Packed": "lowbit",
    "dyn8": "lowbit", "dyn8_map": "lowbit", "plain": "lowbit",
    "coded_adam_step": "lowbit", "coded_direction": "lowbit",
    "ProjectedState": "galore", "galore_low": "galore", "galore_step": "galore", "projected_direction": "galore",
    "projected_low": "galore",
    "Adapter": "peft", "lora": "peft", "lora_init": "peft", "lowrank_delta": "peft", "response_mask": "peft",
    "load_adapter": "peft", "save_adapter": "peft", "grpo_advantage": "loss", "soft_barrier": "loss",
    "Projected": "projected", "projected_groups": "projected",
}  # fmt: skip
__all__, __getattr__, __dir__ = attach(__name__, _HOMES)
