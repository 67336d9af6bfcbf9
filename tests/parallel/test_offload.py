"""Attention in other processes: the same numbers, the bytes of the formula, and no process left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from copy import deepcopy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memlens.cost.serving import wire_bytes
from memlens.parallel import attention_offload, hire
from memlens.parallel.attention_worker import Held
from memlens.tasks.serving_studies import decode, ping_pong

SIZES = {"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 50}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()


@pytest.fixture(scope="module")
def pool(model):
    with attention_offload(model, workers=2) as opened:
        yield opened


@pytest.fixture
def ids(generator):
    return torch.randint(50, (2, 7), generator=generator)


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_decoding_gives_the_same_and_sends_what_the_formula_says(model, pool, ids, assert_close):
    before = pool.volume().sel(tag=["q", "kv", "out"])
    with torch.no_grad():
        there = decode(model, ids, 6, pool.request())
    after = pool.volume().sel(tag=["q", "kv", "out"])
    moved = int((after.sent + after.received).sum() - (before.sent + before.received).sum())
    assert moved == wire_bytes(model.config, 4) * 2 * (7 + 5) * 3  # batch 2, every token but the last, 3 layers
    here = decode(_plain(model), ids, 6)
    assert torch.equal(here.tokens, there.tokens)
    assert_close(there.logits, here.logits)


def _plain(model):
    """The same weights outside of the pool's `with`."""
    twin = LlamaForCausalLM(deepcopy(model.config)).eval()
    twin.load_state_dict(model.state_dict())
    twin.set_attn_implementation("sdpa")
    return twin


@torch.no_grad()
def test_two_requests_and_several_turns_stay_apart(model, pool, ids, assert_close):
    a, b = pool.request(), pool.request()
    for first, last in ((0, 3), (3, 4), (4, 7)):  # a turn of several tokens after others
        got_a = model(ids[:, first:last], past_key_values=a).logits
        got_b = model(ids.flip(1)[:, first:last], past_key_values=b).logits
    twin = _plain(model)
    assert_close(got_a, twin(ids).logits[:, 4:7])
    assert_close(got_b, twin(ids.flip(1)).logits[:, 4:7])
    a.reset()
    assert a.get_seq_length() == 0
    assert_close(model(ids, past_key_values=a).logits, twin(ids).logits)


def test_generate_works(model, pool, ids):
    out = model.generate(ids, past_key_values=pool.request(), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(out[:, 7:], decode(_plain(model), ids, 5).tokens)


def test_two_threads_take_turns(model, pool, ids):
    wanted, found = decode(_plain(model), ids, 5).tokens, {}

    def write(name):
        with pool.taking_turns():
            found[name] = decode(model, ids, 5, pool.request()).tokens

    threads = [threading.Thread(target=write, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(torch.equal(found[n], wanted) for n in range(2))
    times = ping_pong(model, pool, context=32, layers=2, rounds=2)
    assert len(model.base_model.layers) == 3
    assert all((times[name] > 0).all() for name in ("model", "attention", "turns"))


def test_held_grows_by_appending(generator, assert_close):
    parts = [torch.randn(2, 1, 2, n, 4, generator=generator) for n in (1, 300, 5, 900)]
    held = Held()
    for part in parts:
        held.append(*part)
    assert_close(torch.stack(held.tensors), torch.cat(parts, 3))


def test_refusals_leave_the_model_as_it_was(model, pool, ids):
    with pytest.raises(RuntimeError, match="a forward without a request of this pool"):
        model(ids)
    with pytest.raises(RuntimeError, match="beam search"):
        pool.request().layers[0].reorder_cache(torch.tensor([0]))
    # a refused forward spoils nothing
    assert decode(model, ids, 1, pool.request()).tokens.shape == (2, 1)
    with pytest.raises(ValueError, match="kv_heads=2 is no multiple of workers=3"), attention_offload(model, workers=3):
        pass
    with pytest.raises(ValueError, match="workers=0"), hire("memlens.parallel.attention_worker:serve", 0):
        pass


def test_a_worker_that_dies_is_an_error_and_all_end(model, ids):
    before = model.config._attn_implementation
    with attention_offload(model, workers=2) as pool:
        workers, request = pool.team.workers, pool.request()
        decode(model, ids, 1, request)
        workers[0].kill()
        workers[0].wait()
        with pytest.raises(RuntimeError, match="rank 1 ended with code -9"):
            decode(model, ids, 1, request)
    assert all(worker.poll() is not None for worker in workers)
    assert model.config._attn_implementation == before


def test_a_job_that_fails_to_start_is_an_error():
    start = time.monotonic()
    with (
        pytest.raises(RuntimeError, match="rank 1 ended with code 1"),
        hire("memlens.parallel.nowhere:serve", timeout_s=30),
    ):
        pass
    assert time.monotonic() - start < 25


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
def test_workers_leave_when_their_parent_is_killed():
    code = """
import time
from memlens.parallel import hire
with hire("memlens.parallel.attention_worker:serve", 2, heads=1, kv_heads=1, dim=4, dtype="float32") as team:
    print(*[worker.pid for worker in team.workers], flush=True)
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    limit = time.monotonic() + 10
    while time.monotonic() < limit and not all(map(gone, workers)):
        time.sleep(0.05)
    assert all(map(gone, workers))


@pytest.mark.model
def test_smollm2_writes_the_same_with_its_attention_elsewhere(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer("The history of the sea is", return_tensors="pt").input_ids
    here = decode(model, ids, 8)
    with attention_offload(model, workers=3) as pool:
        there = decode(model, ids, 8, pool.request())
    assert torch.equal(here.tokens, there.tokens)
    assert (here.logits - there.logits).abs().max() <= 1e-4
