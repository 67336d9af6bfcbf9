"""Compositions hold the bytes that they predict; advice fits, is ranked, and says why not."""

import itertools

import pytest
import torch
from kv_presets import prompt, tiny

from memlens import kv
from memlens.cost.memory import LLAMA_7B, Llama, kv_bytes, llama_weights
from memlens.kv.advice import PLANS, advise
from memlens.kv.cache import compress, prefill
from memlens.kv.kivi import kivi
from memlens.kv.plan import SELECTORS, Plan
from memlens.kv.think import think

WIDE = Llama(128, 96, 3, 61, 4, 2)  # heads of 32: a group of values
HELD = ("payload", "scales", "indices", "residual", "slow")
GRID = [Plan()] + [
    Plan(select, kept, bits, dropped)
    for select, kept in (("all", 1.0), ("H2O", 0.5), ("SnapKV", 0.5), ("D2O", 0.25))
    for bits, dropped in itertools.product((16, 4, 2), (0.0, 0.25))
    if (select, bits, dropped) != ("all", 16, 0.0)
]
WEIGHTS = 2 * sum(weight.numel for weight in llama_weights(LLAMA_7B))


@pytest.fixture(scope="module")
def filled():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=96, num_hidden_layers=3, vocab_size=61, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return prefill(LlamaForCausalLM(config).eval(), prompt(160), keep_queries=True)


def test_the_law_is_the_size_of_the_tensors(filled):
    held = sum(x.numel() * x.element_size() for layer in filled.cache.layers for x in (layer.keys, layer.values))
    assert kv_bytes(WIDE, 160, itemsize=4) == {"payload": held} == {"payload": 2 * 3 * 2 * 160 * 32 * 4}
    assert kv_bytes(LLAMA_7B, 1)["payload"] == 2 * 32 * 32 * 128 * 2  # half a megabyte a token
    assert kv_bytes(LLAMA_7B, 10, batch=3)["payload"] == 30 * kv_bytes(LLAMA_7B, 1)["payload"]
    assert kv_bytes(tiny("qwen").config, 7)["payload"] == 2 * 3 * 2 * 7 * 16 * 2  # head_dim is not hidden / heads
    with pytest.raises(ValueError, match="kv_bytes: length=-1"):
        kv_bytes(WIDE, -1)


@pytest.mark.parametrize("plan", GRID, ids=lambda plan: plan.name)
def test_a_cache_holds_what_its_plan_predicts(plan, filled):
    cache = compress(filled, plan.policy(160))
    assert cache.held == [plan.tokens(160)] * 3
    held = {part: size for part, size in cache.nbytes().items() if part in HELD and size}
    assert held == {part: size for part, size in plan.bytes(WIDE, 160, itemsize=4).items() if size}


@pytest.mark.parametrize("store", [None, kivi((4, 16), residual=32), kivi((2, 16), residual=32)], ids=["16", "4", "2"])
@pytest.mark.parametrize("dropped", [0.0, 0.25])
def test_the_parts_multiply_along_tokens_channels_and_bits(store, dropped):
    def keys(length, drop, inner):  # values stay plain here, so that no token waits
        held = kv_bytes(WIDE, length, store=think(drop, tail=0, inner=inner) if drop else inner)
        indices = held.get("indices", 0)
        return sum(held.values()) - indices - kv_bytes(WIDE, length)["payload"] // 2

    whole = keys(256, 0.0, None)
    parts = [keys(128, 0.0, None), keys(256, dropped, None), keys(256, 0.0, store)]
    product = whole
    for part in parts:
        product = product * part / whole
    assert keys(128, dropped, store) == product


def test_names_keys_and_axes():
    plan = Plan("H2O", 0.5, 4, 0.25)
    assert (plan.name, plan.keys, plan.parts) == ("H2O 50 % + ThinK 25 % + KIVI-4", ("h2o", "think", "kivi"), 3)
    assert (Plan().name, Plan().keys, Plan().parts) == ("full", (), 0)
    assert (Plan(bits=4, away=True).name, Plan(away=True).keys) == ("KIVI-4 elsewhere", ("lamina",))
    assert Plan(away=True).bytes(WIDE, 10) == {"slow": kv_bytes(WIDE, 10)["payload"]}
    for grid in (GRID, PLANS):
        assert len({plan.name for plan in grid}) == len(grid)


@pytest.mark.parametrize(
    ("plan", "length", "message"),
    [
        (Plan("H20", 0.5), 64, "select='H20'.*did you mean 'H2O'"), (Plan("H2O", 1.5), 64, "kept=1.5"),
        (Plan("H2O"), 64, "a share below 1 with a selection"), (Plan(kept=0.5), 64, "1 with 'all'"),
        (Plan("SnapKV", 0.25), 64, "tokens=16.*SnapKV needs them"), (Plan(bits=5), 64, "bits='5'"),
        (Plan(dropped=1.0), 64, "1.0"), (Plan(), 0, "length=0"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_is_refused(plan, length, message):
    with pytest.raises(ValueError, match=message):
        plan.policy(length)


# --- advice --------------------------------------------------------------------------------------------------------


def test_it_is_at_its_name():
    assert kv.advise is advise
    assert kv.advise is advise  # also once its module was imported


def test_predicted_bytes_are_computed():
    found = advise(4096, 2, 20e9)
    assert found.free == 20e9 - WEIGHTS
    for option in found.ranked:
        sizes = option.plan.bytes(LLAMA_7B, 4096, batch=2)
        assert option.fast + option.slow == sum(sizes.values())
        assert option.fast <= found.free
    full = next(option for option in found.ranked if option.name == "full")
    assert full.fast == 2 * 32 * 32 * 128 * 2 * 4096 * 2


@pytest.mark.parametrize("gpu", [14e9, 16e9, 24e9, 80e9])
@pytest.mark.parametrize("context", [64, 2048, 100_000])
@pytest.mark.parametrize("turns", [1, 2, 9])
@pytest.mark.parametrize("critical", [False, True])
def test_the_rules_hold_everywhere(gpu, context, turns, critical):
    found = advise(context, 4, gpu, turns, critical)
    assert len(found.ranked) + len(found.refused) == len(PLANS)
    assert {one.name for one in found.ranked}.isdisjoint(one.name for one in found.refused)
    assert all(one.fast <= found.free for one in found.ranked)
    assert all(one.why for one in found.refused)
    if turns > 1 and critical:
        assert not any(SELECTORS[one.plan.select].evicts for one in found.ranked)
    if turns > 1:
        assert not any(SELECTORS[one.plan.select].asks for one in found.ranked)


def test_a_whole_cache_that_fits_comes_first():
    for critical in (False, True):
        assert advise(1000, 1, 80e9, 3, critical).ranked[0].name == "full"


def test_where_accuracy_is_critical_the_smallest_loss_comes_first():
    losses = {"full": 0.0, "KIVI-4": 0.01, "full elsewhere": 0.0, "H2O 50 %": 0.001, "ThinK 25 %": 0.5}
    order = [one.name for one in advise(32_000, 1, 24e9, 1, True, measured=losses).ranked]
    assert order[:3] == ["full elsewhere", "H2O 50 %", "KIVI-4"]
    order = [one.name for one in advise(32_000, 1, 24e9, 1, False, measured=losses).ranked]
    assert order[:2] == ["H2O 50 %", "KIVI-4"]
    assert order[-2:] == ["KIVI-4 elsewhere", "full elsewhere"]
    assert advise(32_000, 1, 24e9, 2, True, measured=losses).ranked[1].name == "KIVI-4"


def test_a_measured_loss_decides_and_not_the_bytes():
    plans = (Plan(bits=2), Plan(bits=4))
    assert [one.name for one in advise(2048, 1, 80e9, plans=plans).ranked] == ["KIVI-4", "KIVI-2"]
    swapped = {"KIVI-4": 2.0, "KIVI-2": 1.0}
    assert [one.name for one in advise(2048, 1, 80e9, plans=plans, measured=swapped).ranked] == ["KIVI-2", "KIVI-4"]
    assert [one.name for one in advise(2048, 1, 80e9, plans=plans, measured={"KIVI-2": 9.0}).ranked] == ["KIVI-2", "KIVI-4"]


def test_refusals_say_why():
    why = {one.name: one.why for one in advise(32_000, 1, 24e9, 2, True).refused}
    assert why["full"] == "its cache takes 16.8 GB and the weights leave 10.5 GB"
    assert why["H2O 50 % + KIVI-4"] == "it drops tokens for good, and a later turn may ask for them"
    assert (
        "later turns ask for something else"
        in {one.name: one.why for one in advise(900, 1, 24e9, 2).refused}["SnapKV 25 %"]
    )
    assert (
        "16 tokens are left, and it needs 33" in {one.name: one.why for one in advise(64, 1, 24e9).refused}["SnapKV 25 %"]
    )
    small = advise(64, 1, 10e9)
    assert small.ranked == ()
    assert {one.why for one in small.refused if "SnapKV" not in one.name} == {
        "the weights alone take 3.48 GB more than there is"
    }
    odd = {one.name: one.why for one in advise(64, 1, 10e9, config=Llama(96, 96, 2, 61, 4, 2)).refused}
    assert odd["KIVI-4"] == "heads of 24 do not divide into groups of 32"


def test_it_prints_what_it_found():
    lines = str(advise(32_000, 1, 24e9, 2, True)).splitlines()
    assert lines[0] == "10.5 GB are left by the weights"
    assert lines[1] == "full elsewhere: 0 GB here, 16.8 GB elsewhere"
    assert "not full: its cache takes 16.8 GB and the weights leave 10.5 GB" in lines


@pytest.mark.parametrize(
    "given", [{"context": 0}, {"batch": 0}, {"gpu_bytes": 0}, {"turns": 0}, {"gpu_bytes": float("nan")}]
)
def test_sizes_below_one_are_refused(given):
    with pytest.raises(ValueError, match=f"advise: {next(iter(given))}"):
        advise(**({"context": 64, "batch": 1, "gpu_bytes": 1e9} | given))
