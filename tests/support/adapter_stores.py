"""Real adapters of a tiny model, and engines that read them from wherever they are."""

from __future__ import annotations

from pathlib import Path

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.benchmarks.synthetic_adapters import write_adapter
from loraplex.engine.models.registry import lora_spec

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPT = list(range(2, 40))


class AdapterMaker:
    """Writes adapters for the model in a directory; each seed has other weights."""

    def __init__(self, model: Path, directory: Path) -> None:
        self.spec, _ = lora_spec(str(model))
        self._directory = directory

    def directory(self, seed: int, name: str = "") -> Path:
        path = self._directory / (name or f"seed-{seed}")
        return write_adapter(path, self.spec, rank=8, seed=seed)

    def files(self, seed: int) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.directory(seed).iterdir()}


def tiny_llm(model: Path, cache: Path, **options) -> LLM:
    """An engine that loses no time on a source's failures."""
    return LLM(
        str(model),
        **{
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "device": "cpu",
            "dtype": "float32",
            "max_model_len": 128,
            "pool_bytes": 8 << 20,
            "adapter_cache_directory": str(cache),
            "adapter_backoff_seconds": 0.01,
            "adapter_fetch_attempts": 2,
            "adapter_stall_seconds": 5.0,
            "adapter_retry_seconds": 0.0,
            **options,
        },
    )


def generate(llm: LLM, loras: list[LoRARequest | None]) -> list[list[int] | Exception]:
    """The tokens, or the error, of a request with each of these."""
    outputs = llm.generate(
        [PROMPT] * len(loras), PARAMS, lora_request=loras, use_tqdm=False, return_errors=True
    )
    return [output.error or output.outputs[0].token_ids for output in outputs]
