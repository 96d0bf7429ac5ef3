"""Every setting of the engine, once: type, default and help. CLI flags and docs come from here."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, fields
from typing import Any

from loraplex.engine.memory.eviction import POLICIES
from loraplex.engine.vllm_options import VLLM_OPTIONS, check_vllm_option
from loraplex.lora.options import check_option, option
from loraplex.lora.sources.settings import SourceSettings

GIB = 1 << 30
QUANTIZATIONS = (
    "awq", "bitsandbytes", "bitsandbytes-fp4", "bitsandbytes-int8", "compressed-tensors",
    "fbgemm_fp8", "fp8", "gguf", "gptq",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EngineConfig(SourceSettings):
    """Settings of one engine. Never written after construction.

    Raises ValueError for a value that is not allowed, and for one that this device or build does
    not honour.
    """

    model: str = option(
        "smollm2-135m-instruct",
        "A local directory, a GGUF file, a Hugging Face hub id, or smollm2-135m-instruct, the "
        "embedded model.",
    )
    tokenizer: str | None = option(None, "Directory or hub id of the tokenizer; default: model.")
    revision: str | None = option(None, "Branch, tag or commit of a hub model.")
    dtype: str = option(
        "auto", "Type of weights and activations: auto (the checkpoint's), bfloat16 or float32."
    )
    kv_cache_dtype: str = option(
        "auto",
        "Type of the KV cache: auto (that of weights and activations) or fp8 (float8 e4m3, no "
        "scales; what is beyond 448 becomes that), which takes half the memory of bfloat16 and "
        "costs some accuracy.",
    )
    max_model_len: int | None = option(
        None, "Longest prompt plus output in tokens; default: what the model was trained for."
    )
    max_num_seqs: int = option(256, "Most requests that run at once.")
    max_num_batched_tokens: int = option(2048, "Most tokens computed in one step.")
    block_size: int = option(16, "Tokens of KV cache in one page.")
    pool_bytes: int | None = option(
        None,
        "Bytes of the page pool, which KV cache and adapters share; default: on the CPU the "
        "smaller of 4 GiB and 40 % of the free memory, on a GPU what gpu_memory_utilization "
        "leaves beside weights and activations.",
    )
    host_adapter_bytes: int = option(
        4 * GIB, "Bytes of host memory for adapters that are not in the pool."
    )
    gpu_memory_utilization: float | None = option(
        None,
        "Share of a GPU's memory to use for weights, activations and pool; default: 0.9. On the "
        "CPU, pool_bytes sizes the pool.",
    )
    enable_prefix_caching: bool = option(True, "Reuse the KV cache of prompts that begin alike.")
    eviction_policy: str = option(
        "cost_aware",
        "What goes first when memory lacks, of idle adapters and cached KV: cost_aware (what is "
        "cheapest to bring back, times how likely it is used again) or lru (what was used least "
        "recently).",
    )
    adapter_affinity_tokens: int = option(
        256,
        "How many tokens of service an adapter that is in the pool may be ahead of one that is "
        "not and still be served first.",
    )
    max_num_waiting: int | None = option(
        None, "Most requests that wait; further ones are refused. Default: any number."
    )
    max_queue_seconds: float | None = option(
        None,
        "How long a request may wait for its first turn, where it does not say; refused at once if "
        "it would likely take longer. Default: as long as it takes.",
    )
    tensor_parallel_size: int = option(
        1, "GPUs, or processes on the CPU, to spread the model over; each has a pool of its own."
    )
    quantization: str | None = option(
        None,
        "How the weights are quantised: awq, gptq, fp8, fbgemm_fp8, bitsandbytes, "
        "compressed-tensors or gguf. Default: as the checkpoint says. A plain checkpoint is "
        "quantised on load by fp8 or by bitsandbytes (nf4), bitsandbytes-fp4 or "
        "bitsandbytes-int8.",
    )
    load_format: str = option("auto", "auto reads the checkpoint, dummy makes random weights.")
    skip_tokenizer_init: bool = option(False, "Take and give token ids only.")
    enforce_eager: bool = option(False, "Run without CUDA graphs (the CPU has none).")
    seed: int = option(0, "Seed from which requests without one of their own draw theirs.")
    device: str = option("auto", "cuda, cpu, or auto: cuda where there is a GPU.")
    attention_backend: str = option(
        "auto",
        "streamed (Hopper GPUs: a kernel of our own where requests decode, flashinfer elsewhere), "
        "flashinfer (GPUs), sdpa (torch's own attention, for what flashinfer does not serve), "
        "native (C++ kernels for the CPU), reference (plain torch, slow), or auto, which is native "
        "on the CPU and the first of the others that serves the model on a GPU.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of = {
            "dtype": ("auto", "bfloat16", "float32"),
            "kv_cache_dtype": ("auto", "fp8"),
            "load_format": ("auto", "dummy"),
            "device": ("auto", "cpu", "cuda"),
            "attention_backend": ("auto", "streamed", "flashinfer", "native", "reference", "sdpa"),
            "eviction_policy": tuple(POLICIES),
            "quantization": (None, *QUANTIZATIONS),
        }
        for name, allowed in one_of.items():
            check_option(name, getattr(self, name), getattr(self, name) in allowed,
                   "one of " + ", ".join(map(repr, allowed)))  # fmt: skip
        for name in ("tensor_parallel_size", "max_num_seqs", "max_num_batched_tokens", "block_size",
                     "max_model_len", "pool_bytes", "max_num_waiting"):  # fmt: skip
            value = getattr(self, name)
            if value is not None:
                check_option(name, value, value >= 1, "1 or more")
        for name in ("host_adapter_bytes", "adapter_affinity_tokens"):
            value = getattr(self, name)
            check_option(name, value, value >= 0, "0 or more")
        seconds = self.max_queue_seconds
        check_option("max_queue_seconds", seconds, seconds is None or seconds > 0, "above 0")
        share = self.gpu_memory_utilization
        check_option("gpu_memory_utilization", share, share is None or 0 < share <= 1,
               "above 0 and at most 1")  # fmt: skip
        check_option("max_num_batched_tokens", self.max_num_batched_tokens,
               self.max_num_batched_tokens >= self.max_num_seqs,
               f"at least max_num_seqs={self.max_num_seqs}, so that every running request can "
               "move")  # fmt: skip

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """An EngineConfig; an unknown option is an error that names the known ones.

        vLLM's options for what happens anyway are taken, too.
        """
        known = [f.name for f in fields(cls)]
        for name in options.keys() - set(known):
            if name not in VLLM_OPTIONS:
                raise ValueError(_unknown_option(name, known))
            check_vllm_option(name, options.pop(name))
        if isinstance(options.get("model"), os.PathLike):
            options["model"] = os.fspath(options["model"])
        return cls(**options)


def _unknown_option(name: str, known: list[str]) -> str:
    similar = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {similar[0]}?" if similar else f"the options are {', '.join(known)}"
    return f"{name!r} is not an option: {hint}"
