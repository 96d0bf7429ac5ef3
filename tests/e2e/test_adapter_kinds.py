"""Every kind of adapter that PEFT makes, in batches with plain ones and the base model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import (
    VOCAB_SIZE,
    Oracles,
    check_against_peft,
    grow,
    tiny_llm,
    write_peft_adapter,
    write_tiny_model,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from loraplex import LLM, LoRARequest, SamplingParams

PLAIN = {"target_modules": "all-linear"}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def write_adapters(model_path: Path, directory: Path, configs: dict[str, dict]) -> dict[str, Path]:
    return {
        name: write_peft_adapter(model_path, directory / name, seed, **config)
        for seed, (name, config) in enumerate(configs.items())
    }


def check(model_path: Path, oracle_path: Path, adapters: dict[str, Path]) -> None:
    oracle = Oracles(oracle_path, adapters)
    requests = {name: LoRARequest(name, str(path)) for name, path in adapters.items()}
    with tiny_llm(model_path) as llm:
        check_against_peft(llm, oracle, requests)


@pytest.mark.filterwarnings("ignore")
def test_some_layers_patterns_and_half_precision(model_path, tmp_path, one_thread):
    configs = {
        "plain": PLAIN,
        "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
        "regex": {"target_modules": r".*\.[12]\.(self_attn\.(k|o)|mlp\.down)_proj"},
        "float16": PLAIN,
    }
    adapters = write_adapters(model_path, tmp_path, configs)
    weights = adapters["float16"] / "adapter_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights)
    check(model_path, model_path, adapters)


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_a_model_with_fused_modules(model_path, tmp_path, one_thread):
    fused_path = write_fused_twin(model_path, tmp_path / "phi3")
    configs = {
        "plain": {"target_modules": ["o_proj", "down_proj"]},
        "fused": {"target_modules": ["qkv_proj", "gate_up_proj"]},
        "attention": {"target_modules": ["qkv_proj"], "r": 8, "use_rslora": True},
    }
    check(model_path, fused_path, write_adapters(fused_path, tmp_path, configs))


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_split_modules_on_a_model_that_fuses_them(model_path, tmp_path, one_thread):
    configs = {
        "plain": PLAIN,
        "some": {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 8},
        "dora": {"target_modules": ["k_proj", "gate_proj"], "use_dora": True},
    }
    adapters = write_adapters(model_path, tmp_path, configs)
    check(write_fused_twin(model_path, tmp_path / "phi3"), model_path, adapters)


@pytest.mark.filterwarnings("ignore")
def test_activated_adapters(model_path, tmp_path, one_thread):
    configs = {
        "plain": PLAIN,
        "activated": {**PLAIN, "alora_invocation_tokens": [7, 8, 9]},
        "by-one": {"target_modules": ["v_proj", "down_proj"], "alora_invocation_tokens": [5]},
    }
    adapters = write_adapters(model_path, tmp_path, configs)
    rng = random.Random(1)
    prompts = [[7, 8, 9], [5, 7, 8, 9, 3], [100] * 40]
    # At the beginning and the end of blocks, twice, and amid what several steps compute.
    for start in (15, 16, 17, 32, 45, 64, 70):
        prompt = [rng.randrange(10, VOCAB_SIZE) for _ in range(90)]
        prompt[5:8] = prompt[start : start + 3] = [7, 8, 9]
        prompt[start + 4] = 5
        prompts.append(prompt)
    requests = {name: LoRARequest(name, str(path)) for name, path in adapters.items()}
    oracle = Oracles(model_path, adapters)
    with tiny_llm(model_path) as llm:
        check_against_peft(llm, oracle, requests, prompts)
        check_against_peft(llm, oracle, requests, prompts)


def hit_tokens(llm, prompt: list[int], lora_request: LoRARequest | None) -> int:
    before = llm.stats()["prefix_hit_tokens"]
    llm.generate([prompt], SamplingParams(max_tokens=2, detokenize=False), lora_request, False)
    return llm.stats()["prefix_hit_tokens"] - before


@pytest.mark.filterwarnings("ignore")
def test_what_comes_before_an_invocation_is_shared_with_the_base_model(model_path, tmp_path):
    config = {**PLAIN, "alora_invocation_tokens": [7, 8]}
    adapters = write_adapters(model_path, tmp_path, {"one": config, "other": config})
    one, other = (LoRARequest(name, str(path)) for name, path in adapters.items())
    prompt = [*range(100, 140), 7, 8, *range(150, 172)]
    with tiny_llm(model_path) as llm:
        assert hit_tokens(llm, prompt, one) == 0
        assert hit_tokens(llm, prompt, None) == 32, "two blocks before the invocation"
        assert hit_tokens(llm, prompt, other) == 32
        assert hit_tokens(llm, prompt, one) == 48, "and its own"
        assert hit_tokens(llm, prompt, None) == 48
        uninvoked = prompt[:40] + prompt[42:]
        assert hit_tokens(llm, uninvoked, None) == 32
        assert hit_tokens(llm, uninvoked, one) == 48, "all of it is the base model's"


ENDS = {
    "plain": PLAIN,
    "lora": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "r": 11},
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"], "use_rslora": True},
    "saved": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [*range(3, 210, 9)]},
    "tokens-of-both": {
        "target_modules": ["v_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 7, 100, 101], "lm_head": [5, 8]},
    },
    "saved-head": {**PLAIN, "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_embedding_and_head(is_tied, tmp_path, one_thread):
    model_path = write_tiny_model(tmp_path / "model", tie_word_embeddings=is_tied)
    adapters = write_adapters(model_path, tmp_path, ENDS)
    requests = {name: LoRARequest(name, str(path)) for name, path in adapters.items()}
    oracle = Oracles(model_path, adapters)
    with tiny_llm(model_path) as llm:
        check_against_peft(llm, oracle, requests)
        check_against_peft(llm, oracle, {"saved-head": requests["saved-head"]})


@pytest.mark.filterwarnings("ignore")
def test_a_vocabulary_cut_down_to_the_tokenizers(model_path, tmp_path, one_thread):
    """What training scripts do to a model whose embedding is larger than its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(model_path)
    model.resize_token_embeddings(200)
    model.save_pretrained(tmp_path / "cut")
    config = {**PLAIN, "modules_to_save": ["embed_tokens", "lm_head"]}
    cut = write_peft_adapter(tmp_path / "cut", tmp_path / "adapter", **config)
    oracle = Oracles(model_path, {})
    oracle.add(tmp_path / "cut", "cut", cut)
    rng = random.Random(0)
    prompts = [[rng.randrange(200) for _ in range(n)] for n in (1, 9, 40)]
    with tiny_llm(model_path) as llm:
        check_against_peft(llm, oracle, {"cut": LoRARequest("cut", str(cut))}, prompts)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_tied", [False, True])
def test_added_tokens(tmp_path, one_thread, is_tied):
    """Trained (modules_to_save), or only saved because the embedding was resized."""
    model_path = write_tiny_model(tmp_path / "model", tie_word_embeddings=is_tied)
    plain = write_peft_adapter(model_path, tmp_path / "plain", **PLAIN)
    oracle = Oracles(model_path, {"plain": plain})
    requests = {"plain": LoRARequest("plain", str(plain))}
    for name, num_added, config in (
        ("trained", 5, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        # As PEFT does by itself where the model at its path is smaller.
        ("resized", 40, {"save_embedding_layers": True}),
    ):
        grown = grow(model_path, tmp_path / f"grown-{name}", VOCAB_SIZE + num_added)
        path = write_peft_adapter(grown, tmp_path / name, **PLAIN, **config)
        oracle.add(grown, name, path)
        requests[name] = LoRARequest(name, str(path))
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in (1, 9, 40)]
    own = [rng.randrange(VOCAB_SIZE) for _ in range(20)] + [VOCAB_SIZE + 4, 3, VOCAB_SIZE + 1]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, detokenize=False)
    with tiny_llm(model_path) as llm:
        check_against_peft(llm, oracle, requests, prompts)
        names, added = ["trained", "resized"], set()
        loras = [requests[name] for name in names]
        for name, output in zip(names, llm.generate([own, own], params, loras), strict=True):
            tokens = output.outputs[0].token_ids
            assert tokens == oracle.score(own, tokens, name).greedy_token_ids
            added |= {token for token in tokens if token >= VOCAB_SIZE}
        assert added, "some of the outputs' tokens are added ones"
        check_sampling(llm, own, loras[1])
        for lora, words in (
            (requests["trained"], "'trained' adds 5 tokens"),
            (requests["plain"], "'plain' adds 0 tokens"),
            (None, f"it must be 0 to {VOCAB_SIZE - 1}"),
        ):
            with pytest.raises(ValueError, match=words):
                llm.generate([[1, VOCAB_SIZE + 5]], lora_request=lora, use_tqdm=False)


@pytest.mark.filterwarnings("ignore")
def test_added_tokens_have_the_text_of_the_adapters_tokenizer(tmp_path, one_thread):
    model_path = write_tiny_model(tmp_path / "model")
    words = {f"w{token_id}": token_id for token_id in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(model_path / "tokenizer.json"))
    grown = grow(model_path, tmp_path / "grown", VOCAB_SIZE + 30)
    path = write_peft_adapter(grown, tmp_path / "own", save_embedding_layers=True, **PLAIN)
    tokenizer.add_tokens([f"own{index}" for index in range(30)])
    tokenizer.save(str(path / "tokenizer.json"))
    lora, oracle = LoRARequest("own", str(path)), Oracles(model_path, {})
    oracle.add(grown, "own", path)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with tiny_llm(model_path, skip_tokenizer_init=False) as llm:
        (output,) = llm.generate(["w5 own29 w7"], params, lora_request=lora)
        assert output.prompt_token_ids == [5, VOCAB_SIZE + 29, 7]
        tokens = output.outputs[0].token_ids
        assert tokens == oracle.score(output.prompt_token_ids, tokens, "own").greedy_token_ids
        expected = [f"w{t}" if t < VOCAB_SIZE else f"own{t - VOCAB_SIZE}" for t in tokens]
        assert output.outputs[0].text.split() == expected
        assert "own" in output.outputs[0].text


def check_sampling(llm: LLM, prompt: list[int], lora: LoRARequest) -> None:
    """With all that goes by the vocabulary's size, beside requests to the base model."""
    options = [
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.01, "seed": 2},
        {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "seed": 3},
        {"temperature": 1.0, "allowed_token_ids": [3, 5, 7], "seed": 4},
        {"temperature": 0.0, "logprobs": 20, "prompt_logprobs": 2},
    ]
    params = [
        SamplingParams(max_tokens=12, ignore_eos=True, detokenize=False, **o) for o in options
    ]
    alone = llm.generate([prompt[:20]] * len(params), params, use_tqdm=False)
    mixed = llm.generate(
        [prompt] * len(params) + [prompt[:20]] * len(params),
        params * 2,
        lora_request=[lora] * len(params) + [None] * len(params),
        use_tqdm=False,
    )
    tokens = [output.outputs[0].token_ids for output in mixed]
    assert tokens[len(params) :] == [output.outputs[0].token_ids for output in alone]
    assert set(tokens[3]) <= {3, 5, 7}


def write_fused_twin(model_path: Path, path: Path) -> Path:
    """The same model, as a Phi-3."""
    config = Phi3Config.from_pretrained(model_path)
    config.pad_token_id = None
    Phi3ForCausalLM(config).save_pretrained(path)
    tensors = load_file(model_path / "model.safetensors")
    for layer in range(config.num_hidden_layers):
        for owner, fused, parts in (
            ("self_attn", "qkv", "qkv"),
            ("mlp", "gate_up", ["gate", "up"]),
        ):
            prefix = f"model.layers.{layer}.{owner}"
            weights = [tensors.pop(f"{prefix}.{part}_proj.weight") for part in parts]
            tensors[f"{prefix}.{fused}_proj.weight"] = torch.cat(weights)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.filterwarnings("ignore")
def test_magnitudes_and_biases(tmp_path, one_thread):
    model_path = write_tiny_model(tmp_path / "model", attention_bias=True, mlp_bias=True)
    configs = {
        "plain": PLAIN,
        "dora": {"target_modules": "all-linear", "use_dora": True},
        "dora-some": {"target_modules": ["v_proj", "down_proj"], "use_dora": True, "r": 9},
        "lora-bias": {"target_modules": ["q_proj", "up_proj"], "lora_bias": True},
        "bias": {"target_modules": ["k_proj", "o_proj", "down_proj"], "bias": "lora_only"},
        "bias-dora": {"target_modules": ["q_proj"], "bias": "lora_only", "use_dora": True},
    }
    check(model_path, model_path, write_adapters(model_path, tmp_path, configs))


@pytest.mark.filterwarnings("ignore")
def test_dora_of_a_model_with_fused_modules(model_path, tmp_path, one_thread):
    fused_path = write_fused_twin(model_path, tmp_path / "phi3")
    configs = {"dora": {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"], "use_dora": True}}
    check(model_path, fused_path, write_adapters(fused_path, tmp_path, configs))
