"""An adapter's part in the embedding and the head: LoRA, or a matrix in place of the base model's.

Plain torch, for any device. A step in which no adapter has such a part has no EndBatch, and nothing
of this is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from weakref import WeakMethod

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from loraplex.lora.image import TILE_COLUMNS, TILE_RANKS, AdapterWeights, EndWeights
from loraplex.lora.peft_config import CONFIG_FILE, PeftConfig
from loraplex.lora.peft_file import TargetedModule
from loraplex.lora.spec import AdapterError, AdapterTraits, BaseModelSpec, EndTiles, LoRAModule

Tensor = torch.Tensor
Int32Array = npt.NDArray[np.int32]


# -- loading ---------------------------------------------------------------------------------


def place_ends(
    weights: AdapterWeights,
    modules: Sequence[TargetedModule],
    tensors: Callable[[str], Tensor],
    spec: BaseModelSpec,
    config: PeftConfig,
) -> AdapterWeights:
    """The weights with what these modules, each the embedding or the head, have.

    Raises AdapterError for what does not fit, or is not served there.
    """
    names = [module.name for module in modules]
    for module in modules:
        is_head = spec.head is not None and module.name == spec.head.path
        base = spec.head if is_head else spec.embedding
        assert base is not None
        for name in module.vectors.values():
            raise AdapterError(
                f"tensor {name!r} is not allowed: magnitudes and biases of {base.name} are not "
                "served"
            )
        if "tokens" in module.tensors:
            own = _replace_rows(module, tensors, is_head, spec, config)
            weights = _with_end(weights, own, is_head)
            assert spec.head is not None
            if spec.is_tied and not is_head and spec.head.path not in names:
                tied = _replace_rows(module, tensors, True, spec, config)
                weights = replace(weights, head=tied)
            continue
        _check_shapes(module, base, is_head, spec)
        if "base" in module.tensors:
            _check_copy(tensors(module.tensors["base"]), module.tensors["base"], is_head, spec)
        if module.rank == 0:
            end = EndWeights(tensors(module.tensors["replacement"]), None)
        else:
            end = EndWeights(
                tensors(module.tensor_a), tensors(module.tensor_b), scaling=module.scaling
            )
        weights = _with_end(weights, end, is_head)
    _check_added_tokens(weights, spec)
    return weights


def _with_end(weights: AdapterWeights, end: EndWeights, is_head: bool) -> AdapterWeights:
    return replace(weights, head=end) if is_head else replace(weights, embedding=end)


def _replace_rows(
    module: TargetedModule,
    tensors: Callable[[str], Tensor],
    is_head: bool,
    spec: BaseModelSpec,
    config: PeftConfig,
) -> EndWeights:
    """Rows of tokens' own, as LoRA: one rank for each, which is its difference from the base
    model's row, picked by the token."""
    name, token_ids = module.tensors["tokens"], config.trained_tokens_of(module.name)
    assert spec.embedding is not None
    vocab_size, hidden_size = spec.embedding.in_features, spec.embedding.out_features
    if not token_ids or (
        [module.out_features, module.in_features] != [len(token_ids), hidden_size]
    ):
        raise AdapterError(
            f"tensor {name!r} has shape {[module.out_features, module.in_features]}, expected "
            f"{[len(token_ids), hidden_size]}: {CONFIG_FILE} has {len(token_ids)} "
            "trainable_token_indices for it"
        )
    if len(set(token_ids)) < len(token_ids) or max(token_ids) >= vocab_size:
        raise AdapterError(
            f"{CONFIG_FILE}: trainable_token_indices={list(token_ids)[:10]} is not allowed: they "
            f"must be distinct, and below {vocab_size}, the base model's vocabulary"
        )
    linears = spec.linears
    if linears is None:
        raise AdapterError(f"tensor {name!r} depends on the base model's, which is not here")
    rows = linears.head_rows(token_ids) if is_head else linears.embedding_rows(token_ids)
    difference = tensors(name).float() - rows
    pick = F.one_hot(torch.tensor(token_ids), vocab_size).float()
    if is_head:
        return EndWeights(difference, pick.T.contiguous())
    return EndWeights(pick, difference.T.contiguous())


def _check_added_tokens(weights: AdapterWeights, spec: BaseModelSpec) -> None:
    """A token is read and written, or neither."""
    if spec.embedding is None or spec.head is None:
        return
    num_tokens = spec.embedding.in_features
    numbers = [
        num_tokens if end is None or end.b is not None else end.a.shape[0]
        for end in (weights.embedding, weights.head)
    ]
    if max(numbers) > num_tokens and numbers[0] != numbers[1]:
        raise AdapterError(
            f"{spec.embedding.path} is for {numbers[0]} tokens and {spec.head.path} for "
            f"{numbers[1]}, which is not allowed: with tokens beyond the base model's "
            f"{num_tokens} an adapter must have both matrices, of as many rows"
        )


def _check_shapes(
    module: TargetedModule, base: LoRAModule, is_head: bool, spec: BaseModelSpec
) -> None:
    matrix = [base.out_features, base.in_features] if is_head else [
        base.in_features, base.out_features
    ]  # fmt: skip
    found = [module.out_features, module.in_features]
    expected = matrix if is_head or module.rank == 0 else matrix[::-1]
    # Of a model whose vocabulary was cut down to its tokenizer's, or has tokens added.
    is_own = module.rank == 0 and found[1] == matrix[1] and found[0] > 0
    if found != expected and not (is_own and (found[0] < matrix[0] or spec.serves_added_tokens)):
        name = module.tensors.get("replacement", module.tensors.get("B"))
        raise AdapterError(
            f"tensor {name!r} is of a matrix {found}, expected {expected}: {base.name} of the "
            f"base model is for {matrix[0]} tokens; an adapter with added tokens, whose "
            "vocabulary was resized, is served on the CPU only, and without LoRA on these modules"
        )


def _check_copy(copy: Tensor, name: str, is_head: bool, spec: BaseModelSpec) -> None:
    """PEFT saves the base model's matrix beside A and B; it must be the one that we have."""
    linears = spec.linears
    if linears is None:
        raise AdapterError(f"tensor {name!r} must be the base model's, which is not here")
    if not (linears.is_head(copy) if is_head else linears.is_embedding(copy)):
        raise AdapterError(
            f"tensor {name!r} of shape {list(copy.shape)} is not the base model's: an adapter "
            "that changes it beside LoRA, or was trained on another base model or with a resized "
            "vocabulary, is not served"
        )


# -- a step ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Segment:
    """Rows of one adapter that has a part in the embedding or the head."""

    rows: slice
    traits: AdapterTraits
    pages: Tensor  # int64 [num_pages]


class EndBatch:
    """A step's adapters of which some have a part in the embedding or the head."""

    def __init__(
        self,
        pool: Tensor,
        dtype: torch.dtype,
        spec: BaseModelSpec,
        segment_indptr: Int32Array,
        page_tables: Int32Array,
        traits: Sequence[AdapterTraits],
    ) -> None:
        """pool: uint8 [num_pages, page_bytes], with images of this dtype; the rest by segment."""
        assert spec.embedding is not None and spec.head is not None
        self._vocab_size = spec.embedding.in_features
        self._hidden_size = spec.embedding.out_features
        tile_elements = TILE_RANKS * TILE_COLUMNS
        tiles_per_page = pool.shape[1] // (tile_elements * dtype.itemsize)
        used = pool.view(dtype)[:, : tiles_per_page * tile_elements]
        self._tiles = used.unflatten(1, (tiles_per_page, TILE_RANKS, TILE_COLUMNS))
        self._segments = [
            _Segment(
                rows=slice(*segment_indptr[i : i + 2].tolist()),
                traits=segment_traits,
                pages=torch.from_numpy(page_tables[i]).long().to(pool.device),
            )
            for i, segment_traits in enumerate(traits)
            if segment_traits.has_ends
        ]

    def look_up(self, x: Tensor, token_ids: Tensor) -> None:
        """x [num_tokens, hidden_size]: rows of the embedding, which become the adapters' own."""
        for segment in self._segments:
            end, rows, pages = segment.traits.embedding, segment.rows, segment.pages
            if end is None:
                continue
            ids = token_ids[rows].long()
            if end.b_tile == 0:
                is_own = ids < end.rank
                own = self._rows(pages, end.a_tile, ids.clamp(max=end.rank - 1), self._hidden_size)
                x[rows] = torch.where(is_own[:, None], own, x[rows])
            else:
                a = self._columns(pages, end.a_tile, end.rank, ids)
                b = self._matrix(pages, end.b_tile, end.rank, self._hidden_size)
                x[rows] = (x[rows].float() + a.float() @ b.float()).to(x.dtype)

    def head_of(self, rows: npt.NDArray[np.int64]) -> HeadBatch | None:
        """What becomes of the logits of these rows, ascending; None: they are the base model's."""
        parts = []
        for segment in self._segments:
            begin, end = np.searchsorted(rows, [segment.rows.start, segment.rows.stop]).tolist()
            if segment.traits.head is not None and begin < end:
                parts.append((slice(begin, end), segment.traits.head, segment.pages))
        return HeadBatch(self, parts) if parts else None

    def clamped(self, token_ids: Tensor) -> Tensor:
        """The token ids with the base model's last one for those that it has not, whose rows are
        the adapters' own."""
        return token_ids.clamp(max=self._vocab_size - 1)

    def widened(self, y: Tensor, ends: Sequence[EndTiles]) -> Tensor:
        """y [rows, vocab_size] with columns for what these heads add, impossible until set."""
        num_tokens = max((end.rank for end in ends if end.b_tile == 0), default=0)
        num_added = num_tokens - self._vocab_size
        return F.pad(y, (0, num_added), value=-torch.inf) if num_added > 0 else y

    def change_logits(self, y: Tensor, x: Tensor, end: EndTiles, pages: Tensor) -> None:
        """y [rows, at least vocab_size], of the base model's head, becomes the adapter's own."""
        if end.b_tile == 0:
            y[:, : end.rank] = F.linear(x, self._matrix(pages, end.a_tile, end.rank, x.shape[1]))
            y[:, end.rank :] = -torch.inf
            return
        a = self._matrix(pages, end.a_tile, end.rank, x.shape[1]).float()
        b = self._matrix(pages, end.b_tile, end.rank, self._vocab_size).float()
        y[:, : self._vocab_size] += ((x.float() @ a.T) @ b).to(y.dtype)

    def _tile(self, pages: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
        tiles_per_page = self._tiles.shape[1]
        return pages[tiles // tiles_per_page], tiles % tiles_per_page

    def _matrix(self, pages: Tensor, first_tile: int, rows: int, columns: int) -> Tensor:
        """[rows, columns], by the tile."""
        row_tiles, column_tiles = -(-rows // TILE_RANKS), -(-columns // TILE_COLUMNS)
        tiles = torch.arange(row_tiles * column_tiles, device=pages.device) + first_tile
        grid = self._tiles[self._tile(pages, tiles)].unflatten(0, (row_tiles, column_tiles))
        return grid.transpose(1, 2).reshape(row_tiles * TILE_RANKS, -1)[:rows, :columns]

    def _rows(self, pages: Tensor, first_tile: int, rows: Tensor, columns: int) -> Tensor:
        """Some rows of a matrix with so many columns, [len(rows), columns]."""
        column_tiles = -(-columns // TILE_COLUMNS)
        tiles = rows[:, None] // TILE_RANKS * column_tiles + first_tile
        tiles = tiles + torch.arange(column_tiles, device=pages.device)
        found = self._tiles[*self._tile(pages, tiles), rows[:, None] % TILE_RANKS]
        return found.flatten(1)[:, :columns]

    def _columns(self, pages: Tensor, first_tile: int, rank: int, columns: Tensor) -> Tensor:
        """Some columns of an A of the embedding, [len(columns), rank]."""
        ranks = torch.arange(rank, device=pages.device)
        column_tiles = -(-self._vocab_size // TILE_COLUMNS)
        tiles = ranks // TILE_RANKS * column_tiles + columns[:, None] // TILE_COLUMNS + first_tile
        return self._tiles[
            *self._tile(pages, tiles), ranks % TILE_RANKS, columns[:, None] % TILE_COLUMNS
        ]


@dataclass(frozen=True, slots=True)
class HeadBatch:
    """The rows of a call of the head."""

    ends: EndBatch
    parts: list[tuple[slice, EndTiles, Tensor]]

    def change(self, y: Tensor, x: Tensor) -> Tensor:
        """The logits [rows, vocab_size or more], where y has those of the base model's head."""
        y = self.ends.widened(y, [end for _, end, _ in self.parts])
        for rows, end, pages in self.parts:
            self.ends.change_logits(y[rows], x[rows], end, pages)
        return y


class HeadWithLoRA:
    """The head, and what adapters make of its logits."""

    def __init__(self, base: Callable[[Tensor, Any], Tensor]) -> None:
        self.base = base

    def __call__(self, x: Tensor, batch: HeadBatch | None) -> Tensor:
        y = self.base(x, None)
        return y if batch is None else batch.change(y, x)


class BatchWithEnds(Protocol):
    ends: EndBatch | None


class EmbeddingWithLoRA:
    """The look-up of tokens, and what adapters make of it."""

    def __init__(self, base: WeakMethod[Callable[[Tensor, Any], Tensor]]) -> None:
        """base: of the model that this becomes a part of. A circle of the two would be left to the
        garbage collector, which engines keep from looking at what they began with."""
        self._base = base

    def __call__(self, token_ids: Tensor, batch: BatchWithEnds) -> Tensor:
        look_up = self._base()
        assert look_up is not None
        if batch.ends is None:
            return look_up(token_ids, batch)
        x = look_up(batch.ends.clamped(token_ids), batch)
        batch.ends.look_up(x, token_ids)
        return x
