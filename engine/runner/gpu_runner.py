"""Runs the model on a CUDA device, a step ahead of the host. Knows no scheduling.

Steps of few rows, whether they decode or begin short prompts, replay CUDA graphs: one for each
bucket of rows, with LoRA and without, and where attention wants it, one for decoding alone. What
differs between two steps of a bucket lies in buffers at fixed addresses. Other steps launch their
kernels one by one, while the device works on the last.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from loraplex import native
from loraplex.attention.backend import AttentionBackend
from loraplex.attention.metadata import AttentionMetadata
from loraplex.engine.messages import TokenLogprobs
from loraplex.engine.models.registry import Model
from loraplex.engine.runner import sampler
from loraplex.engine.runner.adjusted_logits import adjust
from loraplex.engine.runner.model_runner import (
    DeviceBatch,
    end_batch,
    make_kv_caches,
    pool,
    score_prompt,
    with_vectors,
    wrap_linears,
)
from loraplex.engine.runner.staging import StagingBuffer
from loraplex.engine.step import StepBatch, StepResult
from loraplex.lora.ends import EndBatch
from loraplex.lora.layers import CudaLoRABatch, LoRABatch, shrink_scratch
from loraplex.lora.plan import ITEM_FIELDS, MAX_RANK, max_items, plan_items
from loraplex.lora.spec import BaseModelSpec

Tensor = torch.Tensor
# Rows of the largest graph. The host launches a larger step's kernels in less time than they take.
MAX_GRAPH_TOKENS = 512
# A graph's attention goes through a prompt a few query rows at a time, as it does through requests
# that decode. What it may read of keys for that, in query rows times context.
MAX_GRAPH_PREFILL = 1 << 17
# Of SamplingBatch, in the order of native.sample's arguments.
SAMPLING_FIELDS = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float64,
    "min_p": np.float64,
    "uniform": np.float64,
}


def graph_buckets(max_num_tokens: int) -> list[int]:
    """Numbers of rows to make graphs for: so close together that little is computed in vain."""
    largest = min(max_num_tokens, MAX_GRAPH_TOKENS)
    buckets = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, largest, 32)]
    return [bucket for bucket in buckets if bucket < largest] + [largest]


@dataclass(slots=True)
class CapturedForward:
    """A captured forward pass, and where it leaves its results."""

    graph: torch.cuda.CUDAGraph
    hidden: Tensor  # [bucket, hidden_size]


@dataclass(slots=True)
class PendingGpuStep:
    """A launched step; its tokens are on their way to pinned memory."""

    token_ids: Tensor  # int64 [L], pinned
    done: torch.cuda.Event
    logprobs: list[TokenLogprobs | None] | None
    prompt_logprobs: list[list[TokenLogprobs]]
    pooled: list[Tensor]

    def result(self) -> StepResult:
        """Wait for the step's tokens."""
        self.done.synchronize()
        pooled = [hidden_sum.cpu().numpy() for hidden_sum in self.pooled]
        return StepResult(self.token_ids.tolist(), self.logprobs, self.prompt_logprobs, pooled)


class GpuModelRunner:
    """Owns the model, the graphs and the memory of the pool."""

    def __init__(
        self,
        model: Model,
        hf_config: Any,
        spec: BaseModelSpec,
        backend: AttentionBackend,
        block_size: int,
        kv_dtype: torch.dtype,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_pool_pages: int,
    ) -> None:
        """max_pool_pages: no pool that `attach_pool` is given has more."""
        self._model = model
        self._hf_config = hf_config
        self._spec = spec
        self._backend = backend
        self._block_size = block_size
        self._kv_dtype = kv_dtype
        self._max_num_seqs = max_num_seqs
        self._max_num_tokens = max_num_batched_tokens
        self._device = model.embedding.device
        self.linears = wrap_linears(model, spec)
        self._most_modules = max(len(linear.modules) for linear in self.linears)
        most_items = max_items(max_num_seqs, max_num_batched_tokens)
        self._inputs = StagingBuffer(
            {
                "token_ids": (np.int32, max_num_batched_tokens),
                "token_slots": (np.int32, max_num_batched_tokens),
                "positions": (np.int64, max_num_batched_tokens),
                "slot_mapping": (np.int64, max_num_batched_tokens),
                "logits_rows": (np.int64, max_num_seqs),
                "sampled_slots": (np.int64, max_num_seqs),
                **{name: (dtype, max_num_seqs) for name, dtype in SAMPLING_FIELDS.items()},
                "items": (np.int32, most_items * ITEM_FIELDS),
                "num_items": (np.int32, 1),
                "pages": (np.int32, max_pool_pages),
            },
            self._device,
        )
        self._lora_scratch = shrink_scratch(self._device)
        self._last_token = torch.zeros(max_num_seqs, dtype=torch.int32, device=self._device)
        self._uploaded = torch.cuda.Event()
        self._graphs: dict[tuple[int, int, bool], CapturedForward] = {}
        self._buckets = graph_buckets(max_num_batched_tokens)
        # Modules whose LoRA products a graph may hold: none, the attention's, all.
        names = [module.path for module in spec.modules]
        attention = sum(1 << m for m, name in enumerate(names) if "attn" in name)
        self._graph_masks = sorted({0, attention, (1 << len(names)) - 1})

    def attach_pool(self, memory: Tensor) -> None:
        """memory: uint8 [num_pages, page_bytes], the pool from now on."""
        self._pool_memory = memory
        self._kv_caches = make_kv_caches(memory, self._hf_config, self._block_size, self._kv_dtype)

    # -- start-up --------------------------------------------------------------------------

    @torch.inference_mode()
    def measure_activations(self) -> int:
        """Bytes that the largest step needs beside weights and pool, measured by running it."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for num_tokens in (self._max_num_tokens, self._buckets[-1]):
            hidden = self._forward(
                num_tokens, self._plan_idle([num_tokens], None), self._graph_masks[-1]
            )
            logits = self._model.logits(hidden[: min(num_tokens, self._max_num_seqs)])
            logits.float().softmax(-1)
            del hidden, logits
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
        return peak

    @torch.inference_mode()
    def capture_graphs(self) -> None:
        """Make the graphs, the largest first: the others fit in its memory."""
        pool = torch.cuda.graph_pool_handle()
        progress = {"desc": "Capturing graphs", "unit": "batch size", "leave": False}
        for bucket in tqdm(self._buckets[::-1], **progress):
            for query_lens in self._idle_steps(bucket):
                attention = self._plan_idle(query_lens, bucket)
                decodes = self._decodes_apart(max(query_lens))
                for mask in self._graph_masks:
                    # Once outside of the graph: libraries make their handles at the first call.
                    self._forward(bucket, attention, mask)
                    torch.cuda.synchronize()
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool):
                        hidden = self._forward(bucket, attention, mask)
                    self._graphs[bucket, mask, decodes] = CapturedForward(graph, hidden)

    def _decodes_apart(self, max_query_len: int) -> bool:
        """Whether such a step needs a graph that is for decoding alone."""
        return self._backend.decodes_apart and max_query_len == 1

    def _idle_steps(self, bucket: int) -> list[list[int]]:
        """Query rows of each request, of a step for each graph of a bucket."""
        steps = [[1] * bucket]
        if self._backend.decodes_apart and bucket > 1:
            steps.append([2] + [1] * (bucket - 2))
        return steps

    def _plan_idle(self, query_lens: list[int], bucket: int | None) -> Any:
        """Attention for rows that only touch the scratch page."""
        num_tokens, longest = sum(query_lens), max(query_lens)
        self._inputs.host["num_items"][0] = 0
        self._inputs.put("token_slots", np.full(num_tokens, -1))
        self._inputs.upload()
        num_blocks = -(-longest // self._block_size)
        return self._backend.plan(
            AttentionMetadata(
                cu_seqlens_q=torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32),
                seq_lens=torch.tensor(query_lens, dtype=torch.int32),
                block_table=torch.zeros(len(query_lens), num_blocks, dtype=torch.int32),
                slot_mapping=self._inputs.device["slot_mapping"][:num_tokens],
                max_query_len=longest,
                graph_num_tokens=bucket,
            )
        )

    # -- a step ----------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, batch: StepBatch) -> PendingGpuStep:
        """Enqueue a step. It may read tokens that steps launched before are yet to sample."""
        # The buffers that the host fills are free when the step before has been copied.
        self._uploaded.synchronize()
        num_tokens = len(batch.token_ids)
        bucket = self._find_bucket(batch)
        self._stage(batch, num_tokens if bucket is None else bucket)
        attention = self._backend.plan(self._metadata(batch, bucket))
        self._inputs.upload()
        self._uploaded.record()
        num_rows = num_tokens if bucket is None else bucket
        ends = end_batch(batch, self._pool_memory, self._model.embedding.dtype, self._spec)
        if bucket is None or batch.vector_mask or ends is not None or not self._graphs:
            hidden = self._forward(num_rows, attention, batch.module_mask, batch, ends)
        else:
            decodes = self._decodes_apart(int(batch.num_new_tokens.max()))
            hidden = self._replay(num_rows, batch.module_mask, decodes)
        prompt_logprobs = [
            score_prompt(self._model, span, hidden, ends) for span in batch.prompt_logprobs
        ]
        rows = self._inputs.device["logits_rows"][: len(batch.logits_rows)]
        head = None if ends is None else ends.head_of(batch.logits_rows)
        logits = self._model.logits(hidden[rows], head)
        return self._sample(batch, logits, prompt_logprobs, pool(batch, hidden))

    def _replay(self, bucket: int, module_mask: int, decodes: bool) -> Tensor:
        """Hidden states of a padded step, by its graph."""
        mask = next(m for m in self._graph_masks if not module_mask & ~m)
        captured = self._graphs[bucket, mask, decodes]
        captured.graph.replay()
        return captured.hidden

    def _find_bucket(self, batch: StepBatch) -> int | None:
        """The number of rows to pad a step to, if it is for a graph. The same with and without
        graphs, so that both multiply alike."""
        num_tokens, query_lens = len(batch.token_ids), batch.num_new_tokens
        prefill = int((query_lens * batch.seq_lens)[query_lens > 1].sum())
        if num_tokens > self._buckets[-1] or prefill > MAX_GRAPH_PREFILL:
            return None
        return self._buckets[bisect_left(self._buckets, num_tokens)]

    def _stage(self, batch: StepBatch, num_rows: int) -> None:
        """Put the step's arrays where the device gets them. Rows beyond the batch's are padding:
        they read and write the scratch page."""
        num_tokens, inputs = len(batch.token_ids), self._inputs
        padding = slice(num_tokens, num_rows)
        for name, fill in (
            ("token_ids", 0), ("token_slots", -1), ("positions", 0), ("slot_mapping", 0)
        ):  # fmt: skip
            inputs.put(name, getattr(batch, name))
            inputs.host[name][padding] = fill
        inputs.put("logits_rows", batch.logits_rows)
        inputs.put("sampled_slots", batch.sampled_slots)
        for name in SAMPLING_FIELDS:
            inputs.put(name, getattr(batch.sampling, name))
        num_items = 0
        if len(batch.page_tables):
            num_pages = (batch.page_tables != 0).sum(1)
            items, pages = plan_items(batch.segment_indptr, batch.page_tables, num_pages)
            num_items = len(items)
            inputs.put("items", items.reshape(-1))
            inputs.put("pages", pages)
        inputs.host["num_items"][0] = num_items

    def _metadata(self, batch: StepBatch, bucket: int | None) -> AttentionMetadata:
        return AttentionMetadata(
            cu_seqlens_q=torch.from_numpy(batch.cu_seqlens_q),
            seq_lens=torch.from_numpy(batch.seq_lens),
            block_table=torch.from_numpy(batch.block_table),
            slot_mapping=self._inputs.device["slot_mapping"][: bucket or len(batch.token_ids)],
            max_query_len=int(batch.num_new_tokens.max()),
            graph_num_tokens=bucket,
        )

    def _forward(
        self,
        num_tokens: int,
        attention: Any,
        module_mask: int,
        step: StepBatch | None = None,
        ends: EndBatch | None = None,
    ) -> Tensor:
        """Hidden states [num_tokens, hidden] of the rows in the input buffers.

        No graph has `step` and `ends`, which adapters with vectors need, or with a part in the
        embedding.
        """
        device = self._inputs.device
        slots = device["token_slots"][:num_tokens]
        token_ids = torch.where(
            slots < 0, device["token_ids"][:num_tokens], self._last_token[slots.clamp(min=0)]
        )
        lora: LoRABatch | None = None
        if module_mask:
            lora = self._lora_batch(num_tokens, module_mask)
        if lora is not None and step is not None and step.vector_mask:
            lora = with_vectors(lora, step, self._pool_memory, self._model.embedding, self._spec)
        batch = DeviceBatch(attention=attention, kv_caches=self._kv_caches, lora=lora, ends=ends)
        return self._model.forward(token_ids, device["positions"][:num_tokens], batch)

    def _lora_batch(self, num_tokens: int, module_mask: int) -> CudaLoRABatch:
        device = self._inputs.device
        return CudaLoRABatch(
            pool=self._pool_memory,
            items=device["items"].view(-1, ITEM_FIELDS),
            num_items=device["num_items"],
            pages=device["pages"],
            num_modules=self._spec.num_modules,
            shrunk=torch.empty(num_tokens * self._most_modules, MAX_RANK, device=self._device),
            scratch=self._lora_scratch,
            module_mask=module_mask,
        )

    def _sample(
        self,
        batch: StepBatch,
        logits: Tensor,
        prompt_logprobs: list[list[TokenLogprobs]],
        pooled: list[Tensor],
    ) -> PendingGpuStep:
        """Choose tokens, keep them for later steps, and send them to the host."""
        sampling, logprobs = batch.sampling, None
        if (sampling.num_logprobs >= 0).any():
            sampled = sampler.sample(logits, sampling)
            chosen = torch.from_numpy(sampled.token_ids).to(self._device)
            logprobs = sampled.logprobs
        else:
            if sampling.adjustments is not None:
                logits = adjust(logits, sampling.adjustments)
            chosen = torch.empty(len(logits), dtype=torch.int64, device=self._device)
            fields = [self._inputs.device[name][: len(logits)] for name in SAMPLING_FIELDS]
            native.sample(chosen, logits, *fields)
        slots = self._inputs.device["sampled_slots"][: len(chosen)]
        self._last_token.index_copy_(0, slots, chosen.int())
        token_ids = torch.empty(len(chosen), dtype=torch.int64, pin_memory=True)
        token_ids.copy_(chosen, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return PendingGpuStep(token_ids, done, logprobs, prompt_logprobs, pooled)
