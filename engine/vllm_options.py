"""Options of vLLM that Loraplex has no need of: taken where they ask for what happens anyway."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, NamedTuple

from loraplex.lora.options import check_option
from loraplex.lora.peft_config import MAX_RANK


class VllmOption(NamedTuple):
    type: type
    values: Container[Any]
    """What may be asked for, since it happens anyway."""
    allowed: str
    """The same in words, with the reason."""


ANY_NUMBER = range(1, 2**31)
VLLM_OPTIONS = {
    "enable_lora": VllmOption(bool, (True,), "True, since adapters are always served"),
    "max_loras": VllmOption(
        int, ANY_NUMBER, "1 or more, though a batch may mix any number of adapters"
    ),
    "max_cpu_loras": VllmOption(
        int, ANY_NUMBER, "1 or more, though host_adapter_bytes bounds adapters in host memory"
    ),
    "max_lora_rank": VllmOption(
        int, range(1, MAX_RANK + 1), f"1 to {MAX_RANK}, the largest rank that is served"
    ),
    "enable_chunked_prefill": VllmOption(bool, (True,), "True, since it always is"),
    "trust_remote_code": VllmOption(
        bool, (False,), "False, since code that comes with a checkpoint is never run"
    ),
    "disable_log_stats": VllmOption(
        bool, (True,), "True, since statistics are asked for: LLM.stats() or /metrics"
    ),
    "pipeline_parallel_size": VllmOption(
        int, (1,), "1, since tensor_parallel_size spreads a model over GPUs"
    ),
}


def check_vllm_option(name: str, value: Any) -> None:
    """Raises ValueError, naming the option, its value and what is allowed, if it asks for more than
    what happens anyway."""
    option = VLLM_OPTIONS[name]
    is_allowed = type(value) is option.type and value in option.values
    check_option(name, value, is_allowed, option.allowed)
