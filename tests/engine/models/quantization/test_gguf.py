"""GGUF files: each block format against the gguf package, and whole files, written here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from quantised_models import SHAPE, check_mixed_batch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loraplex import LLM, SamplingParams
from loraplex.engine.models.config import read_model_config
from loraplex.engine.models.embedded import EMBEDDED_MODEL, find_gguf
from loraplex.engine.models.layers import Linear
from loraplex.engine.models.locate import locate_model, model_name
from loraplex.engine.models.quantization.gguf import FORMATS, Gguf
from loraplex.engine.models.quantization.methods import quantise

WORDS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "ab"]
HEADS = {"q_proj": SHAPE["num_attention_heads"], "k_proj": SHAPE["num_key_value_heads"]}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def random_blocks(name: str, rows: int, columns: int) -> np.ndarray:
    """Blocks of a format, of any bits, but with scales that make weights of about 0.1."""
    kind = FORMATS[name]
    generator = np.random.default_rng(columns)
    num_blocks = rows * columns // kind.size
    blocks = generator.integers(0, 256, (num_blocks, kind.num_bytes), dtype=np.uint8)
    top = {"Q8_0": 0.002, "Q4_0": 0.02, "Q4_1": 0.02, "Q6_K": 1e-4}.get(name, 5e-4)
    scales = generator.uniform(top / 2, top, (num_blocks, 2)).astype(np.float16).view(np.uint8)
    start = 208 if name == "Q6_K" else 0
    width = 2 if name in ("Q6_K", "Q8_0", "Q4_0") else 4
    blocks[:, start : start + width] = scales[:, :width]
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", FORMATS)
def test_products(name):
    rows, columns = 48, 512
    blocks = random_blocks(name, rows, columns)
    weight = torch.from_numpy(quants.dequantize(blocks, GGMLQuantizationType[name]))
    for dtype, error in ((torch.float32, 1e-4), (torch.bfloat16, 0.15)):
        linear = Linear("", columns, {"up_proj": rows}, dtype)
        quantise([linear], Gguf({"types": {"up_proj": name}}))
        ((place_name, place),) = linear.named_weights()
        assert place_name == "up_proj.weight"
        place.copy_(torch.from_numpy(blocks))
        linear.finish_loading()
        x = torch.randn(7, columns).to(dtype)
        y = linear(x, None).float()
        torch.testing.assert_close(y, x.float() @ weight.T, rtol=0.02, atol=error)


def interleave_rotary_halves(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of each head in the order of GGUF's Llamas."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, tensors: dict[str, tuple[np.ndarray, str]], **fields) -> None:
    architecture, rope = fields.pop("architecture", "llama"), fields.pop("rope", {})
    writer = GGUFWriter(path, architecture, **fields)
    for name, value in rope.items():
        add = writer.add_string if name == "type" else writer.add_float32
        add(f"{architecture}.rope.scaling.{name}", value)
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_key_length(SHAPE["head_dim"])
    writer.add_value_length(SHAPE["head_dim"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(WORDS)
    writer.add_token_scores([-float(i) for i in range(len(WORDS))])
    writer.add_token_types([2, 3, 3, *[6] * 256, 1, 1, 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(directory: Path, **fields) -> tuple[Path, Path]:
    """(a GGUF file of a tiny Llama with formats mixed in fused linears, a float32 checkpoint of
    what its weights stand for)."""
    torch.manual_seed(0)
    dense = directory / "dense"
    config = LlamaConfig(**SHAPE | {"vocab_size": len(WORDS)})
    LlamaForCausalLM(config).save_pretrained(dense)
    tensors = load_file(dense / "model.safetensors")
    stored = {}
    kinds = {"v_proj": "Q8_0", "up_proj": "Q4_1", "lm_head": "Q8_0", "embed_tokens": "Q8_0",
             "o_proj": "F16"}  # fmt: skip
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        last = module.split(".")[-1]
        rows = interleave_rotary_halves(weight, HEADS[last]) if last in HEADS else weight
        kind = "F32" if weight.dim() == 1 else kinds.get(last, "Q4_0")
        data = quants.quantize(rows.numpy(), GGMLQuantizationType[kind])
        stands_for = torch.from_numpy(quants.dequantize(data, GGMLQuantizationType[kind]))
        if last in HEADS:
            stands_for = stands_for.unflatten(0, (HEADS[last], -1, 2)).transpose(1, 2)
        # (The embedding is expanded to bfloat16, and dense weights may be rounded to that.)
        tensors[name] = stands_for.reshape(weight.shape).contiguous()
        if last == "embed_tokens":
            tensors[name] = tensors[name].bfloat16().float()
        top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        if module in top:
            stored[f"{top[module]}.weight"] = data, kind
        else:
            layer, inner = module.removeprefix("model.layers.").split(".", 1)
            stored[f"blk.{layer}.{NAMES[inner]}.weight"] = data, kind
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    write_gguf(directory / "tiny.gguf", stored, **fields)
    return directory / "tiny.gguf", dense


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path / "cache"))


def test_a_mixed_batch_equals_the_dequantised_model(own_cache, tmp_path):
    file, dense = write_model(tmp_path)
    check_mixed_batch(file, dense, tmp_path)
    directory = locate_model(str(file))
    assert model_name(str(file), directory) == "tiny"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.encode("a ab") == [1, WORDS.index("▁a"), WORDS.index("▁a"), WORDS.index("b")]
    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_split_file_is_served_and_its_parts_are_looked_for(own_cache, tmp_path):
    _, dense = write_model(tmp_path, split_max_tensors=9)
    first, *_, last = sorted(tmp_path.glob("tiny-*.gguf"))
    check_mixed_batch(first, dense, tmp_path)
    with pytest.raises(ValueError, match="one of 3 parts .* the first, tiny-00001-of-00003.gguf"):
        locate_model(str(last))
    first.rename(tmp_path / "first.gguf")
    with pytest.raises(ValueError, match="one of 3 parts .* end in -00001-of-00003.gguf"):
        locate_model(str(tmp_path / "first.gguf"))
    (tmp_path / "first.gguf").rename(first)
    last.unlink()
    with pytest.raises(ValueError, match="its part tiny-00003-of-00003.gguf is missing"):
        locate_model(str(first))


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        ({"type": "longrope"}, "llama.rope.scaling.type='longrope' .* one of 'none', 'linear'"),
        ({"type": "yarn"}, "lacks llama.rope.scaling.original_context_length"),
    ],
)
def test_rope_scaling_is_that_of_the_file(rope, expected, own_cache, tmp_path):
    write_gguf(tmp_path / "scaled.gguf", {}, rope=rope)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            locate_model(str(tmp_path / "scaled.gguf"))
        return
    parameters = read_model_config(locate_model(str(tmp_path / "scaled.gguf"))).rope_parameters
    assert parameters.items() >= expected.items()


def test_a_changed_file_is_read_anew_and_a_lost_one_is_named(own_cache, tmp_path):
    file, _ = write_model(tmp_path)
    before = locate_model(str(file))
    assert locate_model(str(file)) == before
    file.write_bytes(file.read_bytes() + b"\0")
    assert locate_model(str(file)) != before
    file.unlink()
    with pytest.raises(ValueError, match=r"was made from '.*tiny.gguf', which is gone"):
        LLM(str(before), skip_tokenizer_init=True, device="cpu", pool_bytes=1 << 20)


@pytest.mark.parametrize(
    ("tensors", "architecture", "message"),
    [
        ({}, "mamba", "general.architecture='mamba'.*'llama', 'qwen2', 'qwen3'"),
        ({"blk.0.ssm_in.weight": (np.zeros((4, 32), np.float32), "F32")}, "llama", "ssm_in.weight"),
    ],
)
def test_files_that_are_not_supported_are_refused_by_name(
    tensors, architecture, message, own_cache, tmp_path
):
    write_gguf(tmp_path / "odd.gguf", tensors, architecture=architecture)
    with pytest.raises(ValueError, match=message):
        locate_model(str(tmp_path / "odd.gguf"))


def test_what_is_no_gguf_is_refused(own_cache, tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="no.gguf.*can't be read as GGUF"):
        locate_model(str(tmp_path / "no.gguf"))
    with pytest.raises(ValueError, match=r"types\['lm_head'\]='IQ2_XS'.*one of Q4_0"):
        Gguf({"types": {"lm_head": "IQ2_XS"}})


@pytest.mark.slow
def test_the_file_of_the_embedded_model_is_served_in_4_bits(own_cache):
    """As text and tokens, it is the model that is converted of it."""
    file = find_gguf()
    text = (Path(__file__).parents[4] / "LICENSE").read_text()[:3000]
    params = SamplingParams(temperature=0, max_tokens=8)
    options = {"max_model_len": 512, "pool_bytes": 64 << 20, "device": "cpu"}
    with LLM(str(file), dtype="float32", **options) as llm:
        reply = llm.chat([{"role": "user", "content": "What is the capital of France?"}], params)
    assert "Paris" in reply[0].outputs[0].text
    tokenizer = AutoTokenizer.from_pretrained(locate_model(str(file)))
    converted = AutoTokenizer.from_pretrained(locate_model(EMBEDDED_MODEL))
    assert tokenizer.encode(text) == converted.encode(text)
