"""The weights of linears that are divided among processes; see loraplex.lora.spec.BaseLinears.

Each process is asked for what its share gives. A linear that has some of the inputs in each gives
summands, one that has some of the outputs gives parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from loraplex.engine.runner.base_linears import ModelLinears
from loraplex.lora.spec import BaseModelSpec, LoRAModule, parts_of_share

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Question:
    """What a share's linears are asked for."""

    method: Literal["multiply", "squared_norms", "bias"]
    layer: int
    module_id: int
    x: Tensor | None = None
    """To be multiplied, float32 [rows, in_features of the share]."""

    def answer(self, linears: ModelLinears) -> Tensor:
        arguments = () if self.x is None else (self.x,)
        result: Tensor = getattr(linears, self.method)(self.layer, self.module_id, *arguments)
        return result


class Askable(Protocol):
    """The other processes."""

    def ask(self, questions: Sequence[Question]) -> list[Tensor]:
        """The answers of all of them, each to a question of its own."""


class ParallelLinears:
    """Asks this process and the others."""

    def __init__(self, workers: Askable, own: ModelLinears, spec: BaseModelSpec) -> None:
        """spec: of the whole model, which has a `shard`."""
        self._workers = workers
        self._own = own
        self._spec = spec

    def multiply(self, layer: int, module_id: int, x: Tensor) -> Tensor:
        module, share = self._modules(module_id)
        parts: Sequence[Tensor] = [x] * self._spec.num_shards
        if share.in_features < module.in_features:
            parts = [part.contiguous() for part in x.chunk(self._spec.num_shards, dim=1)]
        return self._ask([Question("multiply", layer, module_id, part) for part in parts])

    def squared_norms(self, layer: int, module_id: int) -> Tensor:
        return self._ask([Question("squared_norms", layer, module_id)] * self._spec.num_shards)

    def bias(self, layer: int, module_id: int) -> Tensor:
        return self._ask([Question("bias", layer, module_id)] * self._spec.num_shards)

    def _modules(self, module_id: int) -> tuple[LoRAModule, LoRAModule]:
        assert self._spec.shard is not None
        return self._spec.modules[module_id], self._spec.shard.modules[module_id]

    def _ask(self, questions: Sequence[Question]) -> Tensor:
        module, share = self._modules(questions[0].module_id)
        own = questions[0].answer(self._own)
        if share == module:
            return own
        answers = [own, *self._workers.ask(questions[1:])]
        if share.in_features < module.in_features:
            return torch.stack(answers).sum(0)
        whole = own.new_empty(*own.shape[:-1], module.out_features)
        for index, answer in enumerate(answers):
            parts = parts_of_share(module.out_features, module.sections, index, len(answers))
            targets = [whole.narrow(-1, *part) for part in parts]
            widths = [target.shape[-1] for target in targets]
            for target, rows in zip(targets, answer.split(widths, dim=-1), strict=True):
                target.copy_(rows)
        return whole
