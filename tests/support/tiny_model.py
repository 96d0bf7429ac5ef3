"""A Llama of random weights so small that the whole engine is compared with PEFT in a second, and
adapters of every kind that PEFT makes for it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from oracle import Oracle, Scored
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loraplex import LLM, LoRARequest, RequestOutput, SamplingParams

VOCAB_SIZE = 211
HIDDEN = 64


def write_tiny_model(path: Path, **shape: Any) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.15,
            "bos_token_id": None,
            "eos_token_id": None,
            **shape,
        }
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    return path


def grow(model_path: Path, path: Path, num_tokens: int) -> Path:
    """What training scripts do to a model to which they add tokens."""
    model = LlamaForCausalLM.from_pretrained(model_path)
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    model.save_pretrained(path)
    return path


def write_peft_adapter(
    model_path: Path,
    path: Path,
    seed: int = 0,
    save_embedding_layers: bool | str = "auto",
    **config: Any,
) -> Path:
    """An adapter that PEFT saves, with random values in whatever it trains."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    peft_model = get_peft_model(
        model, LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **config})
    )
    randomize(peft_model)
    peft_model.save_pretrained(path, save_embedding_layers=save_embedding_layers)
    return path


@torch.no_grad()
def randomize(peft_model: PeftModel) -> None:
    for name, parameter in peft_model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_magnitude_vector" in name:
            parameter.mul_(0.5 + torch.rand_like(parameter))
        elif "lora_A" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.3)


class Oracles:
    """An oracle for the base model and one for each adapter, since some change the base model."""

    def __init__(self, model_path: Path, adapters: Mapping[str, Path]) -> None:
        self._of: dict[str | None, Oracle] = {None: Oracle(model_path, {})}
        for name, path in adapters.items():
            self.add(model_path, name, path)

    def add(self, model_path: Path, name: str, path: Path) -> None:
        self._of[name] = Oracle(model_path, {name: path})

    def score(self, prompt: list[int], output: list[int], adapter: str | None) -> Scored:
        return self._of[adapter].score(prompt, output, adapter)


def tiny_llm(model_path: Path, **options: Any) -> LLM:
    return LLM(
        str(model_path),
        **{
            "skip_tokenizer_init": True,
            "device": "cpu",
            "dtype": "float32",
            "pool_bytes": 16 << 20,
            "max_num_batched_tokens": 64,
            "max_num_seqs": 32,
            **options,
        },
    )


def check_against_peft(
    llm: LLM,
    oracle: Oracle | Oracles,
    lora_requests: Mapping[str, LoRARequest],
    prompts: Sequence[Sequence[int]] | None = None,
    max_tokens: int = 8,
) -> list[RequestOutput]:
    """Every prompt with every adapter and with the base model, in one mixed batch. Adapters go by
    the oracle's names; prompts default to random ones of several lengths."""
    rng = random.Random(0)
    if prompts is None:
        prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in (1, 9, 40)]
    cases = [(list(prompt), name) for prompt in prompts for name in [None, *lora_requests]]
    rng.shuffle(cases)
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0, detokenize=False
    )
    outputs = llm.generate(
        [prompt for prompt, _ in cases],
        params,
        lora_request=[name and lora_requests[name] for _, name in cases],
        use_tqdm=False,
    )
    llm.check_integrity()
    replies = set()
    for (prompt, name), output in zip(cases, outputs, strict=True):
        completion = output.outputs[0]
        scored = oracle.score(prompt, completion.token_ids, name)
        assert completion.token_ids == scored.greedy_token_ids, (name, len(prompt))
        for token_id, logprobs, expected in zip(
            completion.token_ids, completion.logprobs, scored.logprobs, strict=True
        ):
            assert abs(logprobs[token_id].logprob - expected) < 1e-3, (name, len(prompt))
        replies.add((tuple(prompt), tuple(completion.token_ids)))
    assert len(replies) > len(cases) * 0.7, "the adapters make a difference"
    return outputs
