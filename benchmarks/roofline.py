"""How few bytes and FLOPs there can be, by the model's config: what bounds times from below.

Activations are left out, since caches hold them, and so is the embedding, of which a step reads a
row for each request. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from loraplex.benchmarks.workloads import WorkloadRequest, num_distinct_adapters
from loraplex.lora.spec import BaseModelSpec


@dataclass(frozen=True)
class DecodeBytes:
    """Bytes that decode steps of a model read."""

    weights: int
    """All linears and the head, once a step."""
    rank: int
    """Each rank of an adapter, once a step for each distinct adapter."""
    kv_token: int
    """K and V of each token of context, once a step."""

    @classmethod
    def of_model(
        cls,
        hf_config: Any,
        dtype_bytes: int,
        modules: Collection[str] | None = None,
        kv_dtype_bytes: int | None = None,
    ) -> DecodeBytes:
        """modules: the names of those that adapters target; None is all. kv_dtype_bytes: of an
        element of K and V; None is dtype_bytes."""
        import torch  # late, as what follows, which brings it

        from loraplex.engine.models.config import head_dim
        from loraplex.engine.models.registry import base_model_spec

        spec = base_model_spec(hf_config)
        # Of quantised weights the places have dtypes of their own; others are as in the outline.
        layers = sum(
            place.shape.numel()
            * (dtype_bytes if place.dtype == torch.float32 else place.dtype.itemsize)
            for _, place in _places_in_layers(hf_config)
        )
        head = hf_config.hidden_size * hf_config.vocab_size
        kv_elements = 2 * hf_config.num_key_value_heads * head_dim(hf_config)
        return cls(
            weights=layers + dtype_bytes * head,
            rank=dtype_bytes * rank_elements(spec, modules),
            kv_token=(kv_dtype_bytes or dtype_bytes) * spec.num_layers * kv_elements,
        )

    def step(self, batch: int, num_adapters: int, rank: int, context: float) -> float:
        """Of a step of `batch` requests that have so many tokens each before it, on average.

        bytes(B, A, r, L) = weights + A r rank + B (L + 1) kv_token
        """
        return (
            self.weights + num_adapters * rank * self.rank + batch * (context + 1) * self.kv_token
        )


def token_flops(hf_config: Any) -> float:
    """Of a prompt's token: two for each weight of the layers' linears that it meets, which are
    those of some experts where there are many. Attention and the head are left out."""
    plain_config = copy(hf_config)
    plain_config.quantization_config = None
    common = experts = 0
    numbers = set()
    for name, place in _places_in_layers(plain_config):
        _, is_expert, rest = name.partition(".experts.")
        if is_expert:
            numbers.add(rest.split(".")[0])
            experts += place.shape.numel()
        else:
            common += place.shape.numel()
    met = experts * hf_config.num_experts_per_tok / len(numbers) if numbers else 0
    return 2 * (common + met)


def _places_in_layers(hf_config: Any) -> Iterator[tuple[str, Any]]:
    """The weights of all layers' linears, without memory, as the checkpoint has them."""
    from loraplex.engine.models.quantization.methods import find_method, quantise
    from loraplex.engine.models.registry import base_model_spec, outline_model

    model = outline_model(hf_config)
    method = find_method(None, hf_config, num_shards=1)
    if method is not None:
        quantise((linear for _, _, linear in model.linears()), method)
    prefix = f"{base_model_spec(hf_config).layer_path}."
    for name, place in model.named_weights():
        if name.startswith(prefix) and len(place.shape) > 1:
            yield name, place


def offline_seconds(
    needs: DecodeBytes,
    flops_per_token: float,
    workload: Sequence[WorkloadRequest],
    max_num_seqs: int,
    rank: float,
    bandwidth: float,
    flops: float,
) -> float:
    """The least that requests of equal lengths can take which come all at once: prefill by its
    FLOPs, then decode steps by their bytes, so many requests at a time. bandwidth and flops are a
    second's."""
    num_prompt_tokens = sum(len(request.prompt_token_ids) for request in workload)
    num_bytes = 0.0
    for start in range(0, len(workload), max_num_seqs):
        group = workload[start : start + max_num_seqs]
        num_steps = group[0].max_tokens - 1  # The first token is the prompt's.
        context = len(group[0].prompt_token_ids) + num_steps / 2
        num_bytes += num_steps * needs.step(len(group), num_distinct_adapters(group), rank, context)
    return flops_per_token * num_prompt_tokens / flops + num_bytes / bandwidth


def rank_elements(spec: BaseModelSpec, modules: Collection[str] | None = None) -> int:
    """Elements of A and B, in all layers, for each rank of an adapter; modules: None is all."""
    from loraplex.benchmarks.synthetic_adapters import places_of  # late: it brings torch

    targeted = [spec.modules[module_id] for _, module_id in places_of(spec, modules)]
    return sum(module.in_features + module.out_features for module in targeted)


def adapter_counts(batch: int, wanted: Iterable[int | str]) -> list[int]:
    """Which of the wanted numbers of distinct adapters a batch of this size can have, in their
    order and each once; "batch" stands for one adapter a request."""
    counts = [batch if count == "batch" else int(count) for count in wanted]
    return list(dict.fromkeys(count for count in counts if count <= batch))
