"""Shared contexts: items follow from the seed, answers stand where they should, modes see what they say, scorers by hand."""

import re
import statistics

import pytest
import torch
import xarray as xr
from transformers import LlamaConfig, LlamaForCausalLM

from memlens.kv.policies import full, h2o, sirllm, snapkv, streaming
from memlens.tasks import shared_studies as studies
from memlens.tasks.shared_context import (
    GENERATORS,
    MODES,
    SCORERS,
    Encoded,
    Item,
    Method,
    Question,
    Turn,
    encode,
    evaluate_shared,
    exact_match,
    f1,
    read,
    substring,
)  # fmt: skip

LOOKED_UP = ("codes", "kv", "prefix_suffix", "mf", "needles")  # the answer stands in the context


class Pieces:
    """A tokenizer of words with their space, digits and single characters; ids below 61 as the tiny model has."""

    def __init__(self):
        self.known = []

    def __call__(self, text, **options):
        found = re.findall(r" ?[a-zA-Z]+|\d|\s|[^\w\s]", text)
        self.known += [piece for piece in dict.fromkeys(found) if piece not in self.known]
        return {"input_ids": [self.known.index(piece) for piece in found]}

    def decode(self, ids):
        return "".join(self.known[i] for i in ids.tolist())


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=48, vocab_size=61, max_position_embeddings=512)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(12.0)
    return model


@pytest.fixture
def item(generator):
    """Random tokens: a context of 60, three turns with answers of 3, 1 and 2."""
    ids = torch.randint(0, 61, (1, 90), generator=generator)
    cuts = [ids[:, 60:64], ids[:, 64:67], ids[:, 67:70], ids[:, 70:71], ids[:, 71:76], ids[:, 76:78]]
    turns = tuple(Question(*pair) for pair in zip(cuts[::2], cuts[1::2], strict=True))
    return Encoded("kv", ids[:, :60], turns, ids[:, 78:79])


def made(task, seed=0, **options):
    return GENERATORS[task](Pieces(), generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("task", GENERATORS)
def test_an_item_follows_from_the_seed_and_fills_its_length(task):
    for length in (320, 450) if task == "codes" else (320, 1000, 2000):
        one, same, other = made(task, length=length), made(task, length=length), made(task, 1, length=length)
        assert one == same != other
        size = len(Pieces()(one.context)["input_ids"])
        assert length - (130 if task == "needles" else 20) <= size <= length
        assert len(one.multi_turns) == 5 == len({turn.input for turn in one.multi_turns})
    assert SCORERS[task](one.multi_turns[0].answer, one.multi_turns[0].answer) == 1.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("task", LOOKED_UP)
def test_an_answer_stands_in_the_context_once(task, seed):
    item = made(task, seed, length=450)
    for turn in item.multi_turns:
        assert item.context.count(turn.answer.strip()) == 1
        if task in ("codes", "kv", "needles"):
            assert turn.input + turn.answer in item.context


def test_the_answer_of_two_ends_is_the_only_word_that_has_them():
    item = made("prefix_suffix", length=1500)
    words = [line[2:] for line in item.context.splitlines()]
    for turn in item.multi_turns:
        begin, end = re.fullmatch(r"Begins with (\w+), ends with (\w+):", turn.input).groups()
        assert [w for w in words if w.startswith(f"{begin}-") and w.endswith(f"-{end}")] == [turn.answer.strip()]


@pytest.mark.parametrize("length", [330, 1000])
def test_chains_of_assignments_give_the_names(length):
    item = made("vt", length=length)
    values, names = {}, []
    for line in item.context.splitlines():
        name, source = line.split(" = ")
        assert name not in values  # assigned once
        values[name] = values.get(source, source)
        names.append(name)
    for turn in item.multi_turns:
        wanted = re.search(r"\d+", turn.input)[0]
        assert turn.answer.strip().split(", ") == [name for name in names if values[name] == wanted] != []


def test_examples_follow_one_rule_and_the_new_ones_are_new():
    item = made("many_shot", length=600)
    shown = [re.fullmatch(r"(\w+) (\d+) -> (\w)", line).groups() for line in item.context.splitlines()]
    rule = {word: label for word, _, label in shown}
    assert len(set(rule.values())) == 3
    assert all(rule[word] == label for word, _, label in shown)
    for turn in item.multi_turns:
        assert turn.input not in item.context
        assert turn.answer == f" {rule[turn.input.split()[0]]}"


def test_statistics_of_the_list():
    item = made("mf", length=700)
    numbers = sorted(int(line) for line in item.context.splitlines())
    assert len(numbers) % 2 == 1
    wanted = [numbers[-1], numbers[0], statistics.median(numbers), numbers[-2], numbers[1]]
    assert [int(turn.answer) for turn in item.multi_turns] == wanted


def test_needles_hide_between_sentences():
    item = made("needles", length=700)
    for turn in item.multi_turns:
        place = item.context.index(turn.input)
        assert place == 0 or item.context[place - 2] in ".!?"
    assert len(item.context.split()) > 300


def test_scorers_by_hand():
    assert [exact_match(" 4821.", "4821"), exact_match("4821 5", "4821"), exact_match("B", "b")] == [1.0, 0.0, 1.0]
    assert [substring("it is 48 21.", "48 21"), substring("4821", "482"), substring("a b", "b a")] == [1.0, 0.0, 0.0]
    assert f1("X1, X2, X3", "X2, X3, X4, X5") == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert [f1("a a", "a"), f1("", ""), f1("", "a"), f1("b", "a")] == [pytest.approx(2 / 3), 1.0, 0.0, 0.0]


def test_generators_and_the_evaluation_refuse_what_they_cannot_make(model, item):
    with pytest.raises(ValueError, match="kv: length=100; expected length >= 160"):
        made("kv", length=100)
    with pytest.raises(ValueError, match="mf: turns=6"):
        made("mf", turns=6)
    with pytest.raises(ValueError, match="turns >= 1"):
        encode(Pieces(), Item("kv", "a b", ()))
    with pytest.raises(ValueError, match="tokens >= 1"):
        encode(Pieces(), Item("kv", "a b", (Turn("", "c"),)))
    keep = Method("full", lambda length: full())
    with pytest.raises(ValueError, match="mode='turns'"):
        evaluate_shared(model, keep, item, "turns")
    with pytest.raises(ValueError, match="task='novel'"):
        evaluate_shared(model, keep, item._replace(task="novel"), MODES[0], tokenizer=Pieces())


def dense_nll(model, parts, answer):
    with torch.no_grad():
        logits = model(torch.cat((*parts, answer), 1)).logits[:, -answer.shape[1] - 1 : -1]
    return float(-logits.log_softmax(-1).gather(-1, answer[..., None]).mean())


def test_a_turn_sees_what_its_mode_says(model, item):
    keep, history = Method("full", lambda length: full()), [item.context]
    session, alone = (evaluate_shared(model, keep, item, mode) for mode in MODES)
    assert session.nll.dims == ("method", "task", "mode", "turn")
    for at, (asked, answer) in enumerate(item.multi_turns):
        assert float(session.nll[0, 0, 0, at]) == pytest.approx(dense_nll(model, [*history, asked], answer), abs=1e-4)
        assert float(alone.nll[0, 0, 0, at]) == pytest.approx(dense_nll(model, [item.context, asked], answer), abs=1e-4)
        history += [asked, answer, item.close]
    assert float(session.nll[0, 0, 0, 0]) == pytest.approx(float(alone.nll[0, 0, 0, 0]), abs=1e-4)
    assert float(abs(session.nll - alone.nll.values)[0, 0, 0, 1:].min()) > 1e-3
    fresh = studies.fresh_prompt(model, item)
    assert abs(fresh.values - alone.nll.values[0, 0, 0]).max() < 1e-4


ROOMS = {
    "h2o": lambda length: h2o(length, 0),
    "snapkv": lambda length: snapkv(length, window=8),
    "sirllm": lambda length: sirllm(entropy=length - 6, recent=2)._replace(when="prompt"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ROOMS)
def test_room_for_all_is_the_full_cache_and_less_is_not(model, item, name, mode):
    wanted = evaluate_shared(model, Method("full", lambda length: full()), item, mode).nll.values
    free = 3 if name == "sirllm" else 1
    every = evaluate_shared(
        model, Method(name, lambda n: ROOMS[name](free * n)._replace(when="prompt")), item, mode
    ).nll.values
    assert abs(every - wanted).max() < 1e-4
    some = evaluate_shared(model, Method(name, lambda n: ROOMS[name](n // 4)), item, mode).nll.values
    assert abs(some - wanted).max() > 1e-2


def test_the_first_question_votes_in_a_session_only(model, item):
    asked = []

    def policy(length):
        asked.append(length)
        return snapkv(16, window=4)

    for mode in MODES:
        evaluate_shared(model, Method("snapkv", policy), item, mode)
    assert asked == [64, 60]
    other = item._replace(multi_turns=(item.multi_turns[2], *item.multi_turns[1:]))
    for mode, moved in zip(MODES, (True, False), strict=True):
        last = [evaluate_shared(model, Method("s", policy), x, mode).nll[..., 1].item() for x in (item, other)]
        assert (abs(last[0] - last[1]) > 1e-4) is moved


def test_a_reading_is_shared_and_left_alone(model, item):
    reading = read(model, item)
    method = Method("streaming", lambda length: streaming(20)._replace(when="prompt"))
    for mode in MODES:
        first, again, own = (evaluate_shared(model, method, item, mode, reading=r).nll for r in (reading, reading, None))
        xr.testing.assert_equal(first, again)
        xr.testing.assert_allclose(first, own, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_written_is_the_greedy_continuation(model, item, mode):
    pieces, keep = Pieces(), Method("full", lambda length: full())
    pieces.known = [f" w{i}" for i in range(61)]
    asked = item.multi_turns[0].input
    with torch.no_grad():
        ids = torch.cat((item.context, asked), 1)
        for _ in range(3):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    greedy = item._replace(multi_turns=(Question(asked, ids[:, -3:]), *item.multi_turns[1:]))
    right = evaluate_shared(model, keep, greedy, mode, tokenizer=pieces)
    assert [right[name][..., 0].item() for name in ("score", "exact", "right")] == [1.0, 1.0, 1.0]
    wrong = greedy._replace(multi_turns=(Question(asked, (ids[:, -3:] + 1) % 61), *item.multi_turns[1:]))
    assert evaluate_shared(model, keep, wrong, mode, tokenizer=pieces).score[..., 0].item() == 0.0


def test_losses_and_signs_by_hand():
    values = [[[0.5, 1.0, 0.5], [0.5, 0.5, 0.0]], [[1.0, 1.0, 1.0], [0.0, 1.0, 0.5]]]
    coords = {"context": [0, 1], "method": ["full", "small"], "turn": [1, 2, 3]}
    lost = studies.losses(xr.DataArray(values, coords, ("context", "method", "turn")))
    assert lost.sel({"method": "small"}).values.tolist() == [[0.0, 0.5, 0.5], [1.0, 0.0, 0.5]]
    after = studies.later(lost)
    assert after.values.ravel().tolist() == [0.5, 0.25]
    assert studies.paired_sign(after, lost.sel(turn=1)).item() == 0.0  # one context each way
    assert studies.paired_sign(after, after).item() == 0.0
    assert studies.paired_sign(after + 1, after).item() == 1.0


@pytest.mark.model
def test_kept_lines_are_those_of_the_policy(smollm2):
    model, tokenizer = smollm2
    item = encode(tokenizer, studies.draw(tokenizer, "codes", 0, length=192))
    kept = studies.kept_lines(model, item, "multi-request", read(model, item), 0.5, methods=["streaming"])
    assert kept.sizes["line"] == 16
    assert kept.values[0].tolist() == pytest.approx([4 / 12, *[0.0] * 7, 8 / 12, *[1.0] * 7])
    assert studies.asked_lines(item)[0] in range(1, 17)
    lines = tokenizer.decode(item.context[0]).splitlines()
    for (asked, _), line in zip(item.multi_turns, studies.asked_lines(item), strict=True):
        assert lines[line - 1].startswith(tokenizer.decode(asked[0]))
