"""Offline throughput on the CPU against transformers and PEFT, in one run on one machine.

Workload: 64 requests of 64 prompt tokens over 16 adapters of rank 16 on all linears, outputs of 8
to 128 tokens, bf16. Useful tokens are those the requests asked for: where a batch runs on until
its longest request ends, the surplus does not count.

    python benchmarks/cpu_vs_peft.py
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from loraplex import LLM, EngineConfig, LoRARequest, SamplingParams
from loraplex.benchmarks.results import write_result
from loraplex.benchmarks.synthetic_adapters import write_adapter
from loraplex.engine.models.locate import locate_model
from loraplex.engine.models.registry import lora_spec

NUM_REQUESTS, PROMPT_TOKENS, NUM_ADAPTERS, RANK = 64, 64, 16, 16
PEFT_BATCH = 16


def make_workload() -> tuple[list[list[int]], list[int], list[int]]:
    """(prompts, output lengths, adapter of each request)"""
    rng = random.Random(0)
    prompts = [[rng.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS)] for _ in range(64)]
    lengths = [8 + (120 * i) // (NUM_REQUESTS - 1) for i in range(NUM_REQUESTS)]
    rng.shuffle(lengths)
    return prompts, lengths, [i % NUM_ADAPTERS for i in range(NUM_REQUESTS)]


def run_loraplex(llm: LLM, adapters: list[Path] | None) -> float:
    prompts, lengths, adapter_of = make_workload()
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    lora = None
    if adapters is not None:
        lora = [LoRARequest(f"a{a}", str(adapters[a])) for a in adapter_of]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
    elapsed = time.perf_counter() - start
    assert sum(len(o.outputs[0].token_ids) for o in outputs) == sum(lengths)
    return sum(lengths) / elapsed


def run_transformers(model, adapter_names: list[str] | None, batch_size: int) -> float:
    prompts, lengths, adapter_of = make_workload()
    start = time.perf_counter()
    for first in range(0, NUM_REQUESTS, batch_size):
        batch = slice(first, first + batch_size)
        options = {}
        if adapter_names is not None:
            options["adapter_names"] = [adapter_names[a] for a in adapter_of[batch]]
        input_ids = torch.tensor(prompts[batch])
        model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max(lengths[batch]),
            min_new_tokens=max(lengths[batch]),
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    return sum(lengths) / (time.perf_counter() - start)


def linear_bound(model_path: Path) -> float:
    """Tokens/s of F.linear alone over all the model's weights, at a batch of 64."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = [torch.randn(NUM_REQUESTS, w.shape[1], dtype=torch.bfloat16) for w in weights]
    best = float("inf")
    with torch.inference_mode():
        for _ in range(5):
            start = time.perf_counter()
            for x, w in zip(inputs, weights, strict=True):
                torch.nn.functional.linear(x, w)
            best = min(best, time.perf_counter() - start)
    return NUM_REQUESTS / best


def repeat(name: str, run: Callable[[], float], times: int) -> list[float]:
    """Figures of several runs, told as they come."""
    figures = []
    for _ in range(times):
        figures.append(round(run(), 1))
        print(f"{name}: {figures[-1]} useful tokens/s", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-peft", action="store_true", help="leave the slow peers out")
    args = parser.parse_args()
    model_path = locate_model(EngineConfig().model)
    spec, _ = lora_spec(EngineConfig().model)
    figures: dict[str, object] = {"linear_bound": round(linear_bound(model_path), 1)}
    with tempfile.TemporaryDirectory() as directory:
        paths = [
            write_adapter(Path(directory) / f"a{i}", spec, rank=RANK, seed=i)
            for i in range(NUM_ADAPTERS)
        ]
        with LLM(dtype="bfloat16", enable_prefix_caching=False) as llm:
            run_loraplex(llm, None)
            figures["loraplex_base"] = repeat(
                "loraplex_base", lambda: run_loraplex(llm, None), args.repeats
            )
            run_loraplex(llm, paths)
            figures["loraplex_mixed"] = repeat(
                "loraplex_mixed", lambda: run_loraplex(llm, paths), args.repeats
            )
        if not args.skip_peft:
            # Imported late, so that the module can be imported where PEFT is not installed.
            from peft import PeftModel

            with torch.inference_mode():
                model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
                figures["transformers_base"] = repeat(
                    "transformers_base", lambda: run_transformers(model, None, NUM_REQUESTS), 1
                )
                names = [f"a{i}" for i in range(NUM_ADAPTERS)]
                # Adapters in the model's bf16, as ours: PEFT's default is float32.
                bf16 = {"autocast_adapter_dtype": False}
                model = PeftModel.from_pretrained(model, str(paths[0]), names[0], **bf16)
                for name, path in zip(names[1:], paths[1:], strict=True):
                    model.load_adapter(str(path), adapter_name=name, **bf16)
                figures["peft_mixed"] = repeat(
                    "peft_mixed", lambda: run_transformers(model.eval(), names, PEFT_BATCH), 1
                )
    report(figures)


def report(figures: dict) -> None:
    best = {name: max(v) if isinstance(v, list) else v for name, v in figures.items()}
    for name, value in best.items():
        print(f"{name:20} {value:8.1f} useful tokens/s   {figures[name]}")
    ratios = {"mixed / base": best["loraplex_mixed"] / best["loraplex_base"]}
    if "peft_mixed" in best:
        ratios["mixed / PEFT"] = best["loraplex_mixed"] / best["peft_mixed"]
        ratios["base / transformers"] = best["loraplex_base"] / best["transformers_base"]
    for name, ratio in ratios.items():
        print(f"{name:20} {ratio:8.2f}")
    if "peft_mixed" in best:
        rounded = {k: round(v, 2) for k, v in ratios.items()}
        write_result("cpu_vs_peft", {"tokens_per_s": figures, "ratios": rounded})


if __name__ == "__main__":
    main()
