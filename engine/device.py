"""Builds the device half: model, pool memory, attention backend, adapter store, runner."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future

import torch

from loraplex.attention.backend import get_backend
from loraplex.engine.config import GIB, EngineConfig
from loraplex.engine.model_runner import ModelRunner
from loraplex.engine.models.config import head_dim, read_model_config, resolve_dtype
from loraplex.engine.models.locate import locate_model, locate_tokenizer, model_name
from loraplex.engine.models.registry import base_model_spec, build_model, page_bytes
from loraplex.engine.request import ModelInfo
from loraplex.engine.tokenizer import read_eos_token_ids
from loraplex.lora.host_store import HostAdapterStore
from loraplex.lora.peft_config import adapter_fingerprint

MAX_DEFAULT_POOL_BYTES = 4 * GIB
DEFAULT_POOL_SHARE = 0.4
NUM_LOADER_THREADS = 4


class PooledAdapters:
    """The host store, and the pool's memory that it copies to."""

    def __init__(self, store: HostAdapterStore, memory: torch.Tensor) -> None:
        self._store = store
        self._memory = memory

    def num_pages(self, version: bytes, path: str) -> int | None:
        image = self._store.get(version, path)
        return None if image is None else image.num_pages

    def max_rank(self, version: bytes) -> int:
        return self._store.image(version).max_rank

    def copy_to_pages(self, version: bytes, pages: list[int]) -> Future[None]:
        return self._store.copy_to_pages(version, self._memory, pages)

    def fingerprint(self, path: str) -> str:
        return adapter_fingerprint(path)


class TorchDevice:
    """The model and everything that has tensors; see loraplex.engine.core.Device."""

    def __init__(self, config: EngineConfig, wake: Callable[[], None]) -> None:
        path = locate_model(config.model, config.revision)
        hf_config = read_model_config(path)
        dtype = resolve_dtype(config.dtype, hf_config)
        trained_len = hf_config.max_position_embeddings
        max_model_len = config.max_model_len or trained_len
        if max_model_len > trained_len:
            raise ValueError(
                f"max_model_len={max_model_len} is not allowed: "
                f"the model was trained for {trained_len} positions"
            )
        self.model_info = ModelInfo(
            model_name=model_name(config.model, path),
            tokenizer_path=str(
                path if config.tokenizer is None else locate_tokenizer(config.tokenizer)
            ),
            max_model_len=max_model_len,
            vocab_size=hf_config.vocab_size,
            eos_token_ids=read_eos_token_ids(path),
        )
        self.page_bytes = page_bytes(hf_config, config.block_size, dtype)
        self.num_pages = (config.pool_bytes or _default_pool_bytes()) // self.page_bytes
        if self.num_pages < 2:
            raise ValueError(
                f"pool_bytes={config.pool_bytes} is not allowed: a page of this model has "
                f"{self.page_bytes} bytes, and the pool needs two at least"
            )
        model = build_model(config, path, hf_config, dtype, max_model_len)
        spec = base_model_spec(hf_config)
        memory = torch.empty(self.num_pages, self.page_bytes, dtype=torch.uint8)
        backend = get_backend(
            config.attention_backend,
            scale=head_dim(hf_config) ** -0.5,
            block_size=config.block_size,
        )
        self.runner = ModelRunner(model, hf_config, spec, backend, memory, config.block_size)
        self._store = HostAdapterStore(
            spec,
            self.page_bytes,
            dtype,
            capacity_bytes=config.host_adapter_bytes,
            num_threads=NUM_LOADER_THREADS,
            on_change=wake,
        )
        self.adapter_store = PooledAdapters(self._store, memory)

    def close(self) -> None:
        self._store.close()


def _default_pool_bytes() -> int:
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(MAX_DEFAULT_POOL_BYTES, int(DEFAULT_POOL_SHARE * free_bytes))
