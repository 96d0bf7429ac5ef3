"""Tiny Llama checkpoints whose linears are quantised in the test, against what they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from oracle import Oracle
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.benchmarks.synthetic_adapters import write_adapter
from loraplex.engine.models.layers import Linear
from loraplex.engine.models.loader import copy_to_place
from loraplex.engine.models.quantization.methods import quantise as give_weights
from loraplex.engine.models.quantization.weight import Method
from loraplex.engine.models.registry import lora_spec

# The checkpoint's tensors by the last part of their names, and the weights they stand for.
Quantised = tuple[dict[str, torch.Tensor], torch.Tensor]
SHAPE = {
    "vocab_size": 101, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 128, "initializer_range": 0.1, "tie_word_embeddings": False,
}  # fmt: skip


def write_quantised(
    directory: Path,
    quantise: Callable[[str, torch.Tensor], Quantised | None],
    quantization_config: dict[str, Any] | None,
    **shape: Any,
) -> tuple[Path, Path]:
    """(a quantised checkpoint, a float32 one of what its weights stand for).

    quantise: called with every linear of the layers and the head, and its name; returns None for
    one that stays as it is.
    """
    torch.manual_seed(0)
    dense, quantised = directory / "dense", directory / "quantised"
    LlamaForCausalLM(LlamaConfig(**(SHAPE | shape))).save_pretrained(dense)
    quantise_checkpoint(dense, quantised, quantise, quantization_config)
    return quantised, dense


def quantise_checkpoint(
    dense: Path,
    quantised: Path,
    quantise: Callable[[str, torch.Tensor], Quantised | None],
    quantization_config: dict[str, Any] | None,
) -> None:
    """Write what a float32 checkpoint is quantised to, and over it what that stands for. See
    write_quantised."""
    tensors = load_file(dense / "model.safetensors")
    packed = dict(tensors)
    linears = "proj.weight", "lm_head.weight", "w1.weight", "w2.weight", "w3.weight"
    for name in [name for name in tensors if name.endswith(linears)]:
        module = name.removesuffix(".weight")
        result = quantise(module, tensors[name])
        if result is not None:
            del packed[name]
            packed |= {f"{module}.{end}": tensor for end, tensor in result[0].items()}
            tensors[name] = result[1].float()
    quantised.mkdir()
    metadata = {"format": "pt"}
    save_file({name: t.contiguous() for name, t in tensors.items()},
              dense / "model.safetensors", metadata=metadata)  # fmt: skip
    save_file({name: t.contiguous() for name, t in packed.items()},
              quantised / "model.safetensors", metadata=metadata)  # fmt: skip
    config = json.loads((dense / "config.json").read_text())
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    (quantised / "config.json").write_text(json.dumps(config))


def check_mixed_batch(quantised: Path, dense: Path, directory: Path, **options: Any) -> None:
    """Greedy tokens and log-probabilities of a mixed, chunked batch of adapters on the quantised
    model, in float32, equal those of transformers and PEFT on what its weights stand for."""
    spec, _ = lora_spec(str(dense))
    modules = {"attention": ["q_proj", "o_proj"], "mlp": ["down_proj", "up_proj"], "all": None}
    adapters = {
        name: write_adapter(directory / name, spec, rank=4 * i + 4, modules=modules[name], seed=i)
        for i, name in enumerate(modules)
    }
    names = [None, *adapters] * 2
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(101, (3 + 7 * i,), generator=generator).tolist() for i in range(len(names))
    ]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0)
    defaults = {"device": "cpu", "max_num_seqs": 16, "max_num_batched_tokens": 64}
    options = {**defaults, "pool_bytes": 8 << 20, **options}
    with LLM(str(quantised), dtype="float32", skip_tokenizer_init=True, **options) as llm:
        outputs = llm.generate(
            prompts, params, use_tqdm=False,
            lora_request=[name and LoRARequest(name, str(adapters[name])) for name in names],
        )  # fmt: skip
        llm.check_integrity()
    oracle = Oracle(dense, adapters)
    for prompt, name, output in zip(prompts, names, outputs, strict=True):
        completion = output.outputs[0]
        scored = oracle.score(prompt, completion.token_ids, name)
        assert completion.token_ids == scored.greedy_token_ids, (name, len(prompt))
        logprobs = [
            of_token[token_id].logprob
            for token_id, of_token in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
        torch.testing.assert_close(
            torch.tensor(logprobs), torch.tensor(scored.logprobs), rtol=0, atol=1e-3
        )


def check_products(
    method: Method,
    quantise: Callable[[str, torch.Tensor], Quantised | None],
    device: str = "cpu",
    in_features: int = 256,
    out_features: tuple[int, ...] = (64, 32, 32),
    atol: float = 0.03,
) -> Linear:
    """A fused linear in bfloat16 multiplies, at few rows and at many, as what it stands for."""
    generator = torch.Generator().manual_seed(0)
    rows = {f"p{i}": n for i, n in enumerate(out_features)}
    with torch.device(device):
        linear = Linear("model.layers.0.", in_features, rows, torch.bfloat16, has_bias=True)
    give_weights([linear], method)
    tensors, weights = {}, []
    for name, n in rows.items():
        module = linear.prefix + name
        weight = torch.randn(n, in_features, generator=generator) / 16
        packed, stands_for = quantise(module, weight) or ({"weight": weight}, weight)
        tensors |= {f"{module}.{end}": tensor for end, tensor in packed.items()}
        tensors[f"{module}.bias"] = torch.randn(n, generator=generator)
        weights.append(stands_for.float())
    for name, place in linear.named_weights():
        copy_to_place(name, tensors.pop(name), place)
    assert not tensors
    linear.finish_loading()
    bias = linear.bias.float().cpu()
    for num_rows in (1, 5, 100):
        x = torch.randn(num_rows, in_features, generator=generator).bfloat16()
        expected = x.float() @ torch.cat(weights).T + bias
        y = linear(x.to(device), None)
        assert y.dtype == torch.bfloat16
        # Scales, weights and results are rounded to 8 bits; errors of weights average out.
        torch.testing.assert_close(y.float().cpu(), expected, rtol=0.02, atol=atol)
    return linear
