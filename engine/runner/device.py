"""Builds the device half: model, pool memory, attention backend, adapter store, runner."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loraplex import native
from loraplex.attention.backend import AttentionBackend, get_backend
from loraplex.attention.metadata import AttentionShape
from loraplex.engine.config import GIB, EngineConfig
from loraplex.engine.messages import ModelInfo
from loraplex.engine.models.cache import cache_root
from loraplex.engine.models.config import (
    max_positions,
    read_model_config,
    resolve_dtype,
    resolve_kv_dtype,
)
from loraplex.engine.models.decoder import Decoder
from loraplex.engine.models.locate import locate_model, locate_tokenizer, model_name
from loraplex.engine.models.registry import (
    Model,
    base_model_spec,
    build_model,
    outline_model,
    page_bytes,
)
from loraplex.engine.models.shards import WHOLE, Shard, shard_config
from loraplex.engine.runner.base_linears import ModelLinears
from loraplex.engine.runner.gpu_runner import MAX_GRAPH_TOKENS, GpuModelRunner
from loraplex.engine.runner.model_runner import ModelRunner
from loraplex.engine.runner.parallel_model import Group, join_model
from loraplex.engine.runner.pooled_adapters import PooledAdapters
from loraplex.engine.text.generation_config import read_default_sampling, read_eos_token_ids
from loraplex.engine.versions import warn_of_unsuitable_packages
from loraplex.lora.host_store import HostAdapterStore
from loraplex.lora.page_memory import allocate_pages
from loraplex.lora.shards import sharded_spec
from loraplex.lora.sources.fetcher import AdapterFetcher
from loraplex.lora.spec import BaseLinears, BaseModelSpec

MAX_DEFAULT_POOL_BYTES = 4 * GIB
DEFAULT_POOL_SHARE = 0.4
DEFAULT_GPU_SHARE = 0.9
# Of the pool that activations are measured with: they only touch the scratch page.
MEASURING_PAGES = 2
# Of adapters, that a step waits for to be copied to a GPU, if the step before does not hide it:
# some 2 ms. What is more goes on beside the steps.
AWAITED_COPY_BYTES = 128 << 20


class TorchDevice:
    """The model and everything that has tensors; see loraplex.engine.core.Device."""

    runner: ModelRunner | GpuModelRunner

    def __init__(
        self,
        config: EngineConfig,
        wake: Callable[[], None],
        shard: Shard = WHOLE,
        meeting: Path | None = None,
        make_adapters: Callable[..., PooledAdapters] = PooledAdapters,
        join_linears: Callable[[ModelLinears, BaseModelSpec], BaseLinears] = lambda own, _: own,
    ) -> None:
        """shard: what of the model is here; meeting: the directory where all processes that have
        some of it meet; make_adapters: takes the fields of PooledAdapters; join_linears: makes
        those of the whole model of those of the first share."""
        warn_of_unsuitable_packages()
        device = resolve_device(config, shard)
        path = locate_model(config.model, config.revision)
        whole_config = read_model_config(path)
        hf_config = shard_config(whole_config, shard.count)
        self._group = None if meeting is None else Group(meeting, shard, device)
        dtype = resolve_dtype(config.dtype, hf_config)
        max_model_len = _resolve_max_model_len(config, hf_config)
        self.model_info = ModelInfo(
            model_name=model_name(config.model, path),
            tokenizer_path=str(locate_tokenizer(config.tokenizer) if config.tokenizer else path),
            max_model_len=max_model_len,
            vocab_size=whole_config.vocab_size,
            eos_token_ids=read_eos_token_ids(path),
            default_sampling=read_default_sampling(path),
            dtype=str(dtype).removeprefix("torch."),
            device=device.type,
        )
        kv_dtype = resolve_kv_dtype(config.kv_cache_dtype, dtype)
        self.page_bytes = page_bytes(hf_config, config.block_size, kv_dtype)
        whole_spec, spec = _specs(whole_config, hf_config, device)
        backend = get_backend(
            config.attention_backend,
            _attention_shape(config, hf_config, max_model_len, dtype, kv_dtype, device),
        )
        model = build_model(config, path, hf_config, dtype, max_model_len, device, shard)
        head = model.lm_head if isinstance(model, Decoder) else None
        self.num_awaited_pages = 0
        if device.type == "cuda":
            self.steps_ahead = 1
            self.num_awaited_pages = AWAITED_COPY_BYTES // self.page_bytes
            memory, self.runner = self._build_gpu_runner(
                config, model, hf_config, spec, backend, kv_dtype
            )
        else:
            self.steps_ahead = 0
            pool_bytes = config.pool_bytes or _default_pool_bytes() // shard.count
            memory = self._allocate(pool_bytes, device)
            self.runner = ModelRunner(
                model, hf_config, spec, backend, memory, config.block_size, kv_dtype
            )
            self._join(model)
        self.memory, self.num_pages = memory, len(memory)
        self.linears = ModelLinears(self.runner.linears, model.embedding, head)
        if shard.index == 0:
            if shard.count > 1:
                spec = sharded_spec(whole_spec, spec, shard.count)
            spec = replace(spec, linears=join_linears(self.linears, spec))
            self.adapter_store = make_adapters(*self._adapters(config, wake, dtype, spec), memory)

    def _adapters(
        self,
        config: EngineConfig,
        wake: Callable[[], None],
        dtype: torch.dtype,
        spec: BaseModelSpec,
    ) -> tuple[AdapterFetcher, HostAdapterStore]:
        """For the whole model, `spec`."""
        chosen = config.adapter_cache_directory
        directory = Path(chosen).expanduser() if chosen else cache_root() / "adapters"
        store = HostAdapterStore(
            spec,
            self.page_bytes,
            dtype,
            capacity_bytes=config.host_adapter_bytes,
            on_change=wake,
            retry_seconds=config.adapter_retry_seconds,
        )
        return AdapterFetcher(config, directory), store

    def _build_gpu_runner(
        self,
        config: EngineConfig,
        model: Model,
        hf_config: Any,
        spec: BaseModelSpec,
        backend: AttentionBackend,
        kv_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, GpuModelRunner]:
        """The pool gets what is left of the device's memory, as measured."""
        device = model.embedding.device
        runner = GpuModelRunner(
            model,
            hf_config,
            spec,
            backend,
            config.block_size,
            kv_dtype,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            max_pool_pages=torch.cuda.mem_get_info(device)[1] // self.page_bytes,
        )
        self._join(model)
        runner.attach_pool(self._allocate(MEASURING_PAGES * self.page_bytes, device))
        activation_bytes = runner.measure_activations()
        pool_bytes = config.pool_bytes
        if pool_bytes is None:
            free_bytes, total_bytes = torch.cuda.mem_get_info(device)
            share = config.gpu_memory_utilization or DEFAULT_GPU_SHARE
            used_bytes = total_bytes - free_bytes
            pool_bytes = int(share * total_bytes) - used_bytes - activation_bytes
        memory = self._allocate(pool_bytes, device)
        runner.attach_pool(memory)
        supports_graphs = backend.supports_graphs and model.supports_graphs
        if supports_graphs and not config.enforce_eager:
            runner.capture_graphs()
        return memory, runner

    def _allocate(self, pool_bytes: int, device: torch.device) -> torch.Tensor:
        num_pages = pool_bytes // self.page_bytes
        if self._group is not None:
            num_pages = self._group.smallest(num_pages)
        if num_pages < 2:
            raise ValueError(
                f"pool_bytes={pool_bytes} is not allowed: a page of this model has "
                f"{self.page_bytes} bytes, and the pool needs two at least"
            )
        if device.type == "cpu":
            # Adapters and KV lie anywhere in it: with small pages of the system's that is a miss in
            # the processor's page tables every few tiles.
            return allocate_pages(num_pages * self.page_bytes).view(num_pages, self.page_bytes)
        return torch.empty(num_pages, self.page_bytes, dtype=torch.uint8, device=device)

    def _join(self, model: Model) -> None:
        """Have a share of a model, to which adapters attach already, compute with the others."""
        if self._group is not None:
            assert isinstance(model, Decoder)
            join_model(model, self._group)

    def close(self) -> None:
        self.adapter_store.close()


def resolve_device(config: EngineConfig, shard: Shard = WHOLE) -> torch.device:
    """Raises ValueError for a device that this machine or build does not have."""
    has_cuda = torch.cuda.is_available() and native.has_cuda()
    if config.device == "cuda" and not has_cuda:
        lack = "this build has no CUDA kernels" if torch.cuda.is_available() else "there is no GPU"
        raise ValueError(f"device='cuda' is not allowed here: {lack}; use 'cpu' or 'auto'")
    if has_cuda and config.device != "cpu":
        if shard.count == 1:
            return torch.device("cuda", torch.cuda.current_device())
        if shard.count > torch.cuda.device_count():
            raise ValueError(
                f"tensor_parallel_size={shard.count} is not allowed: there are "
                f"{torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(shard.index)
        return torch.device("cuda", shard.index)
    if config.gpu_memory_utilization is not None:
        raise ValueError(
            f"gpu_memory_utilization={config.gpu_memory_utilization} is not allowed on the CPU, "
            "where pool_bytes sizes the pool: leave it out"
        )
    return torch.device("cpu")


def _specs(
    whole_config: Any, hf_config: Any, device: torch.device
) -> tuple[BaseModelSpec, BaseModelSpec]:
    """Of the model and of a share, whose embedding and head are the whole's to adapters."""
    whole, share = base_model_spec(whole_config), base_model_spec(hf_config)
    if device.type == "cpu":
        # On a GPU logits have room for the base model's tokens only.
        whole, share = (replace(spec, serves_added_tokens=True) for spec in (whole, share))
    else:
        reason = "LoRA on experts is served on the CPU, not on GPUs"
        whole, share = whole.without_experts(reason), share.without_experts(reason)
    return whole, replace(share, embedding=whole.embedding, head=whole.head)


def _attention_shape(
    config: EngineConfig,
    hf_config: Any,
    max_model_len: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    device: torch.device,
) -> AttentionShape:
    outline = outline_model(hf_config)
    max_pages_of_request = -(-max_model_len // config.block_size)
    return AttentionShape(
        num_heads=outline.heads.num_heads,
        num_kv_heads=outline.heads.num_kv_heads,
        head_dim=outline.heads.head_dim,
        scale=outline.scale,
        logits_soft_cap=outline.logits_soft_cap,
        windows=outline.windows,
        block_size=config.block_size,
        dtype=dtype,
        kv_dtype=kv_dtype,
        device=device,
        max_num_requests=max(config.max_num_seqs, MAX_GRAPH_TOKENS),
        max_num_pages=max(config.max_num_seqs * max_pages_of_request, MAX_GRAPH_TOKENS),
    )


def _resolve_max_model_len(config: EngineConfig, hf_config: Any) -> int:
    trained_len = max_positions(hf_config)
    max_model_len = config.max_model_len or trained_len
    if max_model_len > trained_len:
        raise ValueError(
            f"max_model_len={max_model_len} is not allowed: "
            f"the model was trained for {trained_len} positions"
        )
    return max_model_len


def _default_pool_bytes() -> int:
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(MAX_DEFAULT_POOL_BYTES, int(DEFAULT_POOL_SHARE * free_bytes))
