"""Runs the model on a step's batch: the device half of the engine. Knows no scheduling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakMethod

import numpy as np
import torch

from loraplex.attention.backend import AttentionBackend, PlannedAttention
from loraplex.attention.metadata import AttentionMetadata
from loraplex.engine.messages import TokenLogprobs
from loraplex.engine.models.decoder import Decoder
from loraplex.engine.models.layers import ExpertLinears, Linear
from loraplex.engine.models.registry import Model, kv_block_shape, model_layers
from loraplex.engine.runner import sampler
from loraplex.engine.runner.logprobs import prompt_logprobs
from loraplex.engine.step import FinishedStep, PromptLogprobsSpan, StepBatch, StepResult
from loraplex.lora.ends import EmbeddingWithLoRA, EndBatch, HeadWithLoRA
from loraplex.lora.layers import CpuLoRABatch, ExpertsWithLoRA, LinearWithLoRA, LoRABatch
from loraplex.lora.spec import BaseModelSpec
from loraplex.lora.vectors import VectorBatch

# Rows of prompt logits computed at a time: a row of logits is as large as the vocabulary.
PROMPT_LOGITS_ROWS = 256


@dataclass(slots=True)
class DeviceBatch:
    """The batch as the model's layers see it."""

    attention: PlannedAttention
    kv_caches: list[tuple[torch.Tensor, torch.Tensor]]
    lora: LoRABatch | None
    ends: EndBatch | None = None

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        window: int | None = None,
    ) -> torch.Tensor:
        k_cache, v_cache = self.kv_caches[layer]
        return self.attention.attend(q, k, v, k_cache, v_cache, window).flatten(1)


class ModelRunner:
    """Owns the model and the memory of the pool."""

    def __init__(
        self,
        model: Model,
        hf_config: Any,
        spec: BaseModelSpec,
        backend: AttentionBackend,
        pool_memory: torch.Tensor,
        block_size: int,
        kv_dtype: torch.dtype,
    ) -> None:
        """pool_memory: uint8 [num_pages, page_bytes]."""
        self._model = model
        self._backend = backend
        self._pool_memory = pool_memory
        self._spec = spec
        self._kv_caches = make_kv_caches(pool_memory, hf_config, block_size, kv_dtype)
        self.linears = wrap_linears(model, spec)
        self._most_modules = max(len(linear.modules) for linear in self.linears)

    @torch.inference_mode()
    def launch(self, batch: StepBatch) -> FinishedStep:
        """Compute the step's tokens, and sample where a request has all its tokens computed.

        It is done at once, so that no token is ever on its way."""
        ends = end_batch(batch, self._pool_memory, self._model.embedding.dtype, self._spec)
        device_batch = DeviceBatch(
            attention=self._backend.plan(_attention_metadata(batch)),
            kv_caches=self._kv_caches,
            lora=self._lora_batch(batch),
            ends=ends,
        )
        token_ids = torch.from_numpy(batch.token_ids)
        hidden = self._model.forward(token_ids, torch.from_numpy(batch.positions), device_batch)
        prompt_logprobs = [
            score_prompt(self._model, span, hidden, ends) for span in batch.prompt_logprobs
        ]
        pooled = [hidden_sum.numpy() for hidden_sum in pool(batch, hidden)]
        if len(batch.sampled) == 0:
            return FinishedStep(StepResult([], None, prompt_logprobs, pooled))
        head = None if ends is None else ends.head_of(batch.logits_rows)
        logits = self._model.logits(hidden[torch.from_numpy(batch.logits_rows)], head)
        sampled = sampler.sample(logits, batch.sampling)
        return FinishedStep(
            StepResult(sampled.token_ids.tolist(), sampled.logprobs, prompt_logprobs, pooled)
        )

    def _lora_batch(self, batch: StepBatch) -> LoRABatch | None:
        if batch.max_rank == 0:
            return None
        num_rows = int(batch.segment_indptr[-1])
        lora = CpuLoRABatch(
            pool=self._pool_memory,
            segment_indptr=torch.from_numpy(batch.segment_indptr),
            page_tables=torch.from_numpy(batch.page_tables),
            num_modules=self._spec.num_modules,
            shrunk=torch.empty(num_rows, self._most_modules, batch.max_rank),
            module_mask=batch.module_mask,
        )
        if batch.vector_mask == 0:
            return lora
        return with_vectors(lora, batch, self._pool_memory, self._model.embedding, self._spec)


def make_kv_caches(
    pool_memory: torch.Tensor, hf_config: Any, block_size: int, kv_dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V of each layer as views of the pool, uint8 [num_pages, page_bytes]."""
    kv = pool_memory.view(kv_dtype).view(-1, *kv_block_shape(hf_config, block_size))
    return [(kv[:, layer, 0], kv[:, layer, 1]) for layer in range(kv.shape[1])]


def pool(batch: StepBatch, hidden: torch.Tensor) -> list[torch.Tensor]:
    """The sum of each pooling span's rows of hidden [num_tokens, hidden_size], in float32."""
    return [
        hidden[span.first_row : span.first_row + span.num_rows].sum(0, dtype=torch.float32)
        for span in batch.pooling
    ]


def score_prompt(
    model: Model, span: PromptLogprobsSpan, hidden: torch.Tensor, ends: EndBatch | None
) -> list[TokenLogprobs]:
    """What the model says of the prompt tokens that follow the span's rows."""
    scores: list[TokenLogprobs] = []
    for start in range(0, len(span.target_ids), PROMPT_LOGITS_ROWS):
        target_ids = torch.from_numpy(span.target_ids[start : start + PROMPT_LOGITS_ROWS])
        row = span.first_row + start
        head = None if ends is None else ends.head_of(np.arange(row, row + len(target_ids)))
        logits = model.logits(hidden[row : row + len(target_ids)], head)
        scores += prompt_logprobs(logits, target_ids.long().to(logits.device), span.num_logprobs)
    return scores


def with_vectors(
    lora: LoRABatch,
    batch: StepBatch,
    pool_memory: torch.Tensor,
    like: torch.Tensor,
    spec: BaseModelSpec,
) -> VectorBatch:
    """The adapters of a step of which some have gains and offsets; `like` has the model's dtype."""
    return VectorBatch(
        lora,
        pool_memory,
        like.itemsize,
        spec,
        batch.segment_indptr,
        batch.page_tables,
        batch.traits,
    )


def end_batch(
    batch: StepBatch, pool_memory: torch.Tensor, dtype: torch.dtype, spec: BaseModelSpec
) -> EndBatch | None:
    """What the adapters of a step make of the embedding and the head; None, as a rule: nothing."""
    if not batch.has_ends:
        return None
    return EndBatch(pool_memory, dtype, spec, batch.segment_indptr, batch.page_tables, batch.traits)


def wrap_linears(model: Model, spec: BaseModelSpec) -> list[LinearWithLoRA]:
    """Let adapters attach to the linears of the spec, and to embedding and head."""
    if isinstance(model, Decoder):
        setattr(model, "look_up", EmbeddingWithLoRA(WeakMethod(model.look_up)))  # noqa: B010 (a method)
        setattr(model, "lm_head", HeadWithLoRA(model.lm_head))  # noqa: B010 (for its type)
    module_ids = {module.path: index for index, module in enumerate(spec.modules)}
    wrapped = []

    def place(
        linear: Linear | ExpertLinears, layer: int
    ) -> tuple[int, list[int], list[int]] | None:
        paths = linear.paths(f"{spec.layer_path}.{layer}.").values()
        if not module_ids.keys() >= set(paths):
            return None
        return layer, [module_ids[path] for path in paths], list(linear.out_features.values())

    for index, layer in enumerate(model_layers(model)):
        for owner, name, linear in list(layer.linears()):
            if (where := place(linear, index)) is not None:
                wrapped.append(LinearWithLoRA(linear, *where))
                setattr(owner, name, wrapped[-1])
        for owner, name, experts in list(layer.expert_linears()):
            if (where := place(experts, index)) is not None:
                setattr(owner, name, ExpertsWithLoRA(experts, *where))
    return wrapped


def _attention_metadata(batch: StepBatch) -> AttentionMetadata:
    return AttentionMetadata(
        cu_seqlens_q=torch.from_numpy(batch.cu_seqlens_q),
        seq_lens=torch.from_numpy(batch.seq_lens),
        block_table=torch.from_numpy(batch.block_table),
        slot_mapping=torch.from_numpy(batch.slot_mapping),
        max_query_len=int(batch.num_new_tokens.max()),
    )
