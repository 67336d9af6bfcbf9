"""What a policy needs from a model beside attention: its shape and rotary frequencies, and the logits, for each token's surprisal.

A policy that `hears` evicts after the forward instead of after each layer: a token's surprisal is known only then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from memlens import check
from memlens.kv.score import surprisal
from memlens.kv.store import refuse
from memlens.models.hooks import rotary_frequencies

if TYPE_CHECKING:
    from memlens.kv.adapter import PolicyCache
    from memlens.kv.policies import Policy

__all__ = ["frequencies", "listening", "shape_of"]


def shape_of(text_config: Any) -> tuple[int, int, int]:
    """(layers, kv heads, dim of a head)."""
    dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return text_config.num_hidden_layers, text_config.num_key_value_heads, dim


def frequencies(model: Any, policy: Policy) -> Tensor | None:
    """The model's rotary frequencies, (D / 2,); None where it has none and the policy asks for none.

    Raises:
        ValueError: a policy that turns keys, and a model without one rotary table over whole heads.
    """
    found = rotary_frequencies(model)
    if found is None and (policy.rolling or (policy.merge and policy.merge.keys == "pre_rope")):
        fix = "use rolling=False, and keys='post_rope' or 'none' in a merge"
        check.fail("PolicyCache", f"{policy.name}, which turns keys", "a model with one rotary table over whole heads", fix)
    return found


@contextmanager
def listening(cache: PolicyCache, model: Any) -> Iterator[None]:
    """Tell the cache the surprisal of the tokens of every forward of the model while this lasts.

    The model is made to compute the logits of all the tokens; it returns those that the caller asked for.

    Raises (in the forward):
        RuntimeError: a forward without input_ids, or one that returns a tuple.
    """
    wanted = []

    def before(module, args, kwargs):
        wanted.append(kwargs.get("logits_to_keep", 0))
        if not isinstance(wanted[-1], int) or _ids(args, kwargs) is None or kwargs.get("return_dict") is False:
            refuse(
                "a forward whose tokens or logits cannot be heard", "pass input_ids, an int logits_to_keep, no return_dict"
            )
        return args, kwargs | {"logits_to_keep": 0}

    def after(module, args, kwargs, output):
        ids, keep = _ids(args, kwargs), wanted[-1]
        cache.hear(surprisal(output.logits, ids, cache.last_logits), output.logits[:, -1])
        output.logits = output.logits[:, -keep:].clone() if keep else output.logits
        return output

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _ids(args: tuple, kwargs: dict):
    return args[0] if args else kwargs.get("input_ids")
