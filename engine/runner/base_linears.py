"""The weights of the model's linears, for adapters whose form depends on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Lock

import torch
import torch.nn.functional as F

from loraplex.lora.layers import LinearWithLoRA

Tensor = torch.Tensor
# Rows of a product that weights are read back by.
ROWS = 256
# How much two roundings of the same matrix, or of its products, may differ: bfloat16 has 0.004.
TOLERANCE = 0.01


def _unit_vectors(size: int) -> Iterator[Tensor]:
    """The rows of the identity, so many at a time: their products are a weight's columns."""
    for indices in torch.arange(size).split(ROWS):
        yield F.one_hot(indices, size).float()


def _is_close(left: Tensor, right: Tensor) -> bool:
    left, right = left.float(), right.float()
    return bool((left - right).norm() <= TOLERANCE * right.norm())


class ModelLinears:
    """Asks linears for their weights by multiplying, so that it is all the same to it what a weight
    is made of and where it lies. See loraplex.lora.spec.BaseLinears."""

    def __init__(
        self,
        linears: Iterable[LinearWithLoRA],
        embedding: Tensor,
        head: Callable[[Tensor, None], Tensor] | None,
    ) -> None:
        """The linears multiply what has the dtype of the embedding, and is on its device."""
        self._like = embedding
        self._head = head
        self._linears = {
            (linear.layer, module_id): (linear, slice(*linear.offsets[i : i + 2]))
            for linear in linears
            for i, module_id in enumerate(linear.modules)
        }
        self._lock = Lock()
        self._squared_norms: dict[tuple[int, int], Tensor] = {}

    def multiply(self, layer: int, module_id: int, x: Tensor) -> Tensor:
        return self._multiply(layer, module_id, x) - self.bias(layer, module_id)

    def bias(self, layer: int, module_id: int) -> Tensor:
        in_features = self._in_features(layer, module_id)
        return self._multiply(layer, module_id, torch.zeros(1, in_features))[0]

    def squared_norms(self, layer: int, module_id: int) -> Tensor:
        with self._lock:
            known = self._squared_norms.get((layer, module_id))
            if known is None:
                rows = _unit_vectors(self._in_features(layer, module_id))
                squares = [self.multiply(layer, module_id, x).square().sum(0) for x in rows]
                known = self._squared_norms[layer, module_id] = torch.stack(squares).sum(0)
            return known

    def is_embedding(self, matrix: Tensor) -> bool:
        return matrix.shape == self._like.shape and _is_close(matrix, self._like.cpu())

    def embedding_rows(self, token_ids: Sequence[int]) -> Tensor:
        return self._like[list(token_ids)].float().cpu()

    @torch.inference_mode()
    def head_rows(self, token_ids: Sequence[int]) -> Tensor:
        assert self._head is not None
        like, hidden_size = self._like, self._like.shape[1]
        zeros = torch.zeros(1, hidden_size, dtype=like.dtype, device=like.device)
        bias = self._head(zeros, None)[:, list(token_ids)].float()
        columns = [
            self._head(x.to(like.device, like.dtype), None)[:, list(token_ids)]
            for x in _unit_vectors(hidden_size)
        ]
        return (torch.cat(columns).float() - bias).T.cpu()

    @torch.inference_mode()
    def is_head(self, matrix: Tensor) -> bool:
        """By what it makes of a few random rows."""
        if self._head is None or matrix.shape != self._like.shape:
            return False
        x = torch.randn(4, matrix.shape[1], generator=torch.Generator().manual_seed(0))
        x = x.to(self._like.device, self._like.dtype)
        logits = self._head(x, None).float() - self._head(torch.zeros_like(x), None).float()
        return _is_close(x.float().cpu() @ matrix.float().T, logits.cpu())

    def _in_features(self, layer: int, module_id: int) -> int:
        return self._linears[layer, module_id][0].base.in_features

    @torch.inference_mode()
    def _multiply(self, layer: int, module_id: int, x: Tensor) -> Tensor:
        linear, columns = self._linears[layer, module_id]
        y = linear.base(x.to(self._like.device, self._like.dtype), None)
        return y[:, columns].float().cpu()
