"""The weights of a model that is divided among processes; see loraplex.lora.spec.BaseLinears.

Each process is asked for what its share gives. A linear that has some of the inputs in each gives
summands, one that has some of the outputs gives parts. Embedding and head are divided by rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from loraplex.engine.runner.base_linears import ModelLinears
from loraplex.lora.spec import BaseModelSpec, LoRAModule, parts_of_share

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Question:
    """A method of ModelLinears, to be called with these arguments in another process."""

    method: str
    arguments: tuple[Any, ...]

    def answer(self, linears: ModelLinears) -> Any:
        return getattr(linears, self.method)(*self.arguments)


class Askable(Protocol):
    """The other processes."""

    def ask(self, questions: Sequence[Question]) -> list[Any]:
        """The answers of all of them, each to a question of its own."""


class ParallelLinears:
    """Asks this process and the others."""

    def __init__(self, workers: Askable, own: ModelLinears, spec: BaseModelSpec) -> None:
        """spec: of the whole model, which has a `shard`."""
        self._workers = workers
        self._own = own
        self._spec = spec

    def multiply(self, layer: int, module_id: int, x: Tensor) -> Tensor:
        parts: Sequence[Tensor] = [x] * self._spec.num_shards
        if self._is_summed(module_id):
            parts = self._split(x, dimension=1)
        return self._join(module_id, [Question("multiply", (layer, module_id, p)) for p in parts])

    def squared_norms(self, layer: int, module_id: int) -> Tensor:
        question = Question("squared_norms", (layer, module_id))
        return self._join(module_id, [question] * self._spec.num_shards)

    def bias(self, layer: int, module_id: int) -> Tensor:
        question = Question("bias", (layer, module_id))
        return self._join(module_id, [question] * self._spec.num_shards)

    def is_embedding(self, matrix: Tensor) -> bool:
        return self._is_whole("is_embedding", matrix)

    def is_head(self, matrix: Tensor) -> bool:
        return self._is_whole("is_head", matrix)

    def embedding_rows(self, token_ids: Sequence[int]) -> Tensor:
        return self._rows("embedding_rows", token_ids)

    def head_rows(self, token_ids: Sequence[int]) -> Tensor:
        return self._rows("head_rows", token_ids)

    # -- putting answers together ------------------------------------------------------------

    def _ask(self, questions: Sequence[Question]) -> list[Any]:
        return [questions[0].answer(self._own), *self._workers.ask(questions[1:])]

    def _split(self, x: Tensor, dimension: int) -> list[Tensor]:
        return [part.contiguous() for part in x.chunk(self._spec.num_shards, dimension)]

    def _modules(self, module_id: int) -> tuple[LoRAModule, LoRAModule]:
        assert self._spec.shard is not None
        return self._spec.modules[module_id], self._spec.shard.modules[module_id]

    def _is_summed(self, module_id: int) -> bool:
        module, share = self._modules(module_id)
        return share.in_features < module.in_features

    def _join(self, module_id: int, questions: Sequence[Question]) -> Tensor:
        module, share = self._modules(module_id)
        if share == module:
            whole: Tensor = questions[0].answer(self._own)
            return whole
        answers = self._ask(questions)
        if self._is_summed(module_id):
            return torch.stack(answers).sum(0)
        whole = answers[0].new_empty(*answers[0].shape[:-1], module.out_features)
        for index, answer in enumerate(answers):
            parts = parts_of_share(module.out_features, share.sections, index, len(answers))
            targets = [whole.narrow(-1, *part) for part in parts]
            widths = [target.shape[-1] for target in targets]
            for target, values in zip(targets, answer.split(widths, dim=-1), strict=True):
                target.copy_(values)
        return whole

    def _is_whole(self, method: str, matrix: Tensor) -> bool:
        if len(matrix) != self._vocab_size:
            return False
        return all(self._ask([Question(method, (p,)) for p in self._split(matrix, dimension=0)]))

    def _rows(self, method: str, token_ids: Sequence[int]) -> Tensor:
        ids, size = torch.tensor(token_ids), self._vocab_size // self._spec.num_shards
        owners, own_ids = ids // size, ids % size
        masks = [owners == index for index in range(self._spec.num_shards)]
        answers = self._ask([Question(method, (own_ids[mask].tolist(),)) for mask in masks])
        whole = answers[0].new_empty(len(token_ids), answers[0].shape[1])
        for mask, rows in zip(masks, answers, strict=True):
            whole[mask] = rows
        return whole

    @property
    def _vocab_size(self) -> int:
        assert self._spec.embedding is not None
        return self._spec.embedding.in_features
