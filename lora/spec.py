"""What adapters attach to, and the error of one that does not. No torch, no files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch


class AdapterError(ValueError):
    """An adapter cannot be served; `status` is the HTTP status that fits."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class AdapterChanged(AdapterError):
    """The version that was asked for is not to be had any more; another one may be."""

    def __init__(self, message: str, status: int = 409) -> None:
        super().__init__(message, status)


class Section(NamedTuple):
    """Outputs of a linear that follow one another and are divided by themselves where the model is,
    as those of q, k and v are."""

    size: int
    """How many a share of the model has, relative to its other sections."""
    copies: int = 1
    """So many neighbouring shares have the same ones."""


ONE_SECTION = (Section(1),)
"""Of a linear whose outputs are all of one kind."""


@dataclass(frozen=True)
class LoRAModule:
    """A linear that layers of the base model have, and that adapters may target."""

    name: str
    """As in "q_proj"."""
    path: str
    """Inside the layer, as in "self_attn.q_proj"."""
    in_features: int
    out_features: int
    num_experts: int = 1
    """More: it is as many linears, and each row goes to those of the experts that it is for."""
    layers: frozenset[int] | None = None
    """Those that have it; None: all."""
    sections: tuple[Section, ...] = ONE_SECTION
    """What its outputs consist of."""


class BaseLinears(Protocol):
    """The base model's weights W and biases, for adapters whose form depends on them.

    All results are float32, in host memory. Called by several threads.
    """

    def multiply(self, layer: int, module_id: int, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in_features] -> x W^T [rows, out_features]."""

    def squared_norms(self, layer: int, module_id: int) -> torch.Tensor:
        """Of the rows of W, [out_features]."""

    def bias(self, layer: int, module_id: int) -> torch.Tensor:
        """[out_features]; zeros if it has none."""

    def is_embedding(self, matrix: torch.Tensor) -> bool:
        """Whether it is the embedding, as far as rounding lets one tell."""

    def embedding_rows(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[len(token_ids), hidden_size]"""

    def head_rows(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Of the head's weight, [len(token_ids), hidden_size]."""

    def is_head(self, matrix: torch.Tensor) -> bool:
        """Whether it is the head's weight, as far as rounding lets one tell."""


@dataclass(frozen=True)
class EndTiles:
    """Where an adapter's matrices for the embedding or the head are in its image."""

    a_tile: int
    b_tile: int
    """0: there is no B, and A takes the place of the base model's matrix."""
    rank: int
    """Rows of A."""


@dataclass(frozen=True)
class AdapterTraits:
    """What a step with an adapter is planned by."""

    max_rank: int
    module_mask: int
    """Bit m is set if module m is targeted in any layer."""
    vector_mask: int = 0
    """Bit m is set if module m has a gain and an offset in any layer (lora/vectors.py)."""
    embedding: EndTiles | None = None
    head: EndTiles | None = None
    invocation_token_ids: tuple[int, ...] = ()
    """It acts from the last place on where the prompt has these tokens; (): everywhere."""
    num_added_tokens: int = 0
    """Beyond those of the base model, with the token ids that follow."""

    @property
    def has_ends(self) -> bool:
        """Whether it has a part in the embedding or the head."""
        return self.embedding is not None or self.head is not None

    def first_token(self, prompt_token_ids: Sequence[int]) -> int | None:
        """The index of the first token that it acts on; None: on none, since it is not invoked."""
        invocation = list(self.invocation_token_ids)
        if not invocation:
            return 0
        for start in range(len(prompt_token_ids) - len(invocation), -1, -1):
            if prompt_token_ids[start : start + len(invocation)] == invocation:
                return start
        return None


@dataclass(frozen=True)
class BaseModelSpec:
    """What a base model offers to adapters. A module's id is its index in `modules`."""

    architecture: str
    num_layers: int
    modules: tuple[LoRAModule, ...]
    layer_path: str = "model.layers"
    embedding: LoRAModule | None = None
    """Of names in full, as in "model.embed_tokens", and from token ids to hidden states."""
    head: LoRAModule | None = None
    """The same, from hidden states to logits."""
    is_tied: bool = False
    """Whether the head's weight is the embedding."""
    shard: BaseModelSpec | None = None
    """What each process has of it; None: there is one, which has all."""
    num_shards: int = 1
    renamed_parts: Mapping[str, str] = field(default_factory=dict)
    """Parts of modules' names in adapters of older checkpoints, from dot to dot, and what they are
    now."""
    refused_parts: Mapping[str, str] = field(default_factory=dict)
    """By the path of a part of a layer, as in "mlp.experts", why adapters can't target it here."""
    serves_added_tokens: bool = False
    """Whether adapters may have tokens beyond the base model's."""
    linears: BaseLinears | None = field(default=None, compare=False, repr=False)
    """None: only what fits is known, so that adapters that need them can't be loaded."""

    def without_experts(self, reason: str) -> BaseModelSpec:
        """The same where adapters can't target the linears of experts, and why."""
        experts = [module.path for module in self.modules if module.num_experts > 1]
        return replace(
            self,
            modules=tuple(module for module in self.modules if module.num_experts == 1),
            refused_parts=dict.fromkeys((path.rpartition(".")[0] for path in experts), reason),
        )

    @property
    def num_modules(self) -> int:
        """Modules per layer."""
        return len(self.modules)

    def module_path(self, layer: int, module_id: int) -> str:
        """As in "model.layers.0.self_attn.q_proj"."""
        return f"{self.layer_path}.{layer}.{self.modules[module_id].path}"


def whole_size(sections: Sequence[Section], count: int) -> int:
    """Of sections in the whole model, relative to their sizes in one of `count` shares."""
    return sum(section.size * (count // section.copies) for section in sections)


def parts_of_share(
    size: int, sections: Sequence[Section], index: int, count: int
) -> Iterator[tuple[int, int]]:
    """Begin and length of what one of `count` shares has of a dimension of this size: a part of
    each of its sections.

    Raises ValueError for a section that can't be divided.
    """
    begin, total = 0, whole_size(sections, count)
    for section in sections:
        length, rest = divmod(size * section.size, total)
        if rest:
            raise ValueError(
                f"tensor_parallel_size={count} is not allowed: it must divide the parts of {size} "
                f"outputs, which are of sizes like {[section.size for section in sections]}"
            )
        yield begin + length * (index // section.copies), length
        begin += length * (count // section.copies)
