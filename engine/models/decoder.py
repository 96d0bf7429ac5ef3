"""What all architectures share: embedding, blocks, final norm and head.

An architecture is a subclass that says how its blocks are made. Names in the checkpoint are class
attributes; what a config may say and is honoured only in part is in SUPPORTED.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch

from loraplex.engine.models.blocks import (
    MLP,
    Attention,
    ForwardBatch,
    HeadNormSplit,
    Heads,
    HeadSplit,
    Layer,
    activation,
    gated_activation,
)
from loraplex.engine.models.config import declared, head_dim, num_kv_heads
from loraplex.engine.models.layers import Linear, Module, Norm, RMSNorm, Table
from loraplex.engine.models.rope import Rope, RotaryPositions, rope_cos_sin_cache
from loraplex.engine.models.weights import NamedPlaces
from loraplex.lora.spec import Section

Tensor = torch.Tensor


class Decoder(Module, ABC):
    """A decoder-only language model."""

    LAYERS: ClassVar[str] = "model.layers"
    EMBEDDING: ClassVar[str] = "model.embed_tokens"
    FINAL_NORM: ClassVar[str] = "model.norm"
    HEAD: ClassVar[str] = "lm_head"
    # Of the attention's projections, and of a gated MLP's first: one for each, or one for all.
    QKV: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj")
    OUT: ClassVar[str] = "o_proj"
    GATE_UP: ClassVar[tuple[str, ...]] = ("gate_proj", "up_proj")
    # Checkpoint tensors that carry nothing: tables computed anew.
    IGNORED_SUFFIXES: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq",)
    # Of parts that are not served.
    IGNORED_PREFIXES: ClassVar[tuple[str, ...]] = ()
    # What tensors' names begin with in older checkpoints, and in newer ones.
    OTHER_PREFIXES: ClassVar[Mapping[str, str]] = {}
    # Likewise for what is amid them, from dot to dot.
    OTHER_PARTS: ClassVar[Mapping[str, str]] = {}
    # Whether positions may be on a part of each head, by partial_rotary_factor.
    TURNS_PARTS: ClassVar[bool] = False
    supports_graphs: ClassVar[bool] = True
    # The values that are honoured, for fields of the config where not all are.
    SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def __init__(self, config: Any, dtype: torch.dtype, max_model_len: int) -> None:
        """Raises ValueError naming a field of the config whose value is not supported."""
        for name, supported in self.SUPPORTED.items():
            value = getattr(config, name, supported[0])
            if value not in supported:
                raise ValueError(
                    f"{name}={value!r} is not supported: it must be one of "
                    + ", ".join(map(repr, supported))
                )
        turned = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
        if turned != 1.0 and not self.TURNS_PARTS:
            raise ValueError(
                f"partial_rotary_factor={turned} is not supported for {type(self).__name__}: it "
                "must be 1"
            )
        self.config = config
        self.dtype = dtype
        self.max_model_len = max_model_len
        self.heads = self.make_heads()
        self.rope = self.make_rope()
        self.tokens = Table(self.EMBEDDING, config.vocab_size, config.hidden_size, dtype)
        self.layers = [
            self.make_layer(index, f"{self.LAYERS}.{index}.")
            for index in range(config.num_hidden_layers)
        ]
        self.norm = self.make_norm(self.FINAL_NORM, config.hidden_size)
        self.lm_head = self.make_head()
        self.is_tied: bool = config.tie_word_embeddings

    # -- what architectures override ---------------------------------------------------------

    @abstractmethod
    def make_layer(self, index: int, prefix: str) -> Layer:
        """Block number `index`; prefix: of its checkpoint tensors, as in "model.layers.0."."""

    def make_heads(self) -> Heads:
        config = self.config
        return Heads(
            config.num_attention_heads,
            num_kv_heads(config),
            head_dim(config),
            getattr(config, "num_kv_copies", 1),
        )

    def make_rope(self) -> Rope:
        """The positions of the layers that have no others."""
        return RotaryPositions(rope_cos_sin_cache(self.config, self.max_model_len))

    def rope_of(self, index: int) -> Rope:
        return self.rope

    def make_split(self, prefix: str) -> HeadSplit:
        """How q, k and v come out of their projection."""
        return HeadSplit(self.heads)

    def make_norm(self, name: str, size: int) -> Norm:
        return RMSNorm(name, size, self.config.rms_norm_eps, self.dtype)

    def make_head(self) -> Linear:
        return self.linear("", self.config.hidden_size, {self.HEAD: self.config.vocab_size})

    @property
    def has_qkv_bias(self) -> bool:
        return getattr(self.config, "attention_bias", False)

    @property
    def has_out_bias(self) -> bool:
        return self.has_qkv_bias

    @property
    def scale(self) -> float:
        """Of the attention scores."""
        return self.heads.head_dim**-0.5

    @property
    def logits_soft_cap(self) -> float:
        """Attention scores x become cap * tanh(x / cap); 0: they stay as they are."""
        return 0.0

    def embed(self, token_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        """token_ids, positions [num_tokens] -> [num_tokens, hidden]."""
        return self.look_up(token_ids, batch)

    def logits(self, hidden: Tensor, batch: Any = None) -> Tensor:
        """hidden [num_rows, hidden] -> [num_rows, vocab_size] of the model's dtype.

        batch: for whoever wraps the head.
        """
        return self.lm_head(hidden, batch)

    # -- helpers for them --------------------------------------------------------------------

    def look_up(self, token_ids: Tensor, batch: ForwardBatch) -> Tensor:
        """Rows of the embedding: token_ids [num_tokens] -> [num_tokens, hidden]."""
        return self.tokens(token_ids)

    def linear(
        self, prefix: str, in_features: int, out_features: dict[str, int], has_bias: bool = False
    ) -> Linear:
        return Linear(prefix, in_features, out_features, self.dtype, has_bias)

    def joined_linear(
        self,
        prefix: str,
        in_features: int,
        names: tuple[str, ...],
        sections: tuple[Section, ...],
        has_bias: bool,
    ) -> Linear:
        """Of outputs in sections, which have names in the checkpoint, or one together."""
        tensors = [sections] if len(names) == 1 else [(section,) for section in sections]
        named = dict(zip(names, tensors, strict=True))
        out_features = {name: sum(s.size for s in named[name]) for name in names}
        linear = self.linear(prefix, in_features, out_features, has_bias)
        linear.sections = named
        return linear

    def make_attention(self, index: int, prefix: str) -> Attention:
        hidden, split = self.config.hidden_size, self.make_split(prefix)
        return Attention(
            index,
            self.joined_linear(prefix, hidden, self.QKV, split.sections, self.has_qkv_bias),
            split,
            self.rope_of(index),
            self.linear(prefix, self.heads.q_size, {self.OUT: hidden}, self.has_out_bias),
            self.window(index),
        )

    def head_norm_split(self, prefix: str, suffix: str = "norm") -> HeadSplit:
        """With norms of the heads of q and k, whose names end in the suffix."""
        q_norm, k_norm = (
            self.make_norm(f"{prefix}{name}_{suffix}", self.heads.head_dim) for name in "qk"
        )
        return HeadNormSplit(self.heads, q_norm, k_norm)

    def gated_mlp(self, prefix: str, activation_field: str, has_bias: bool = False) -> MLP:
        hidden, size = self.config.hidden_size, self.config.intermediate_size
        return MLP(
            self.joined_linear(prefix, hidden, self.GATE_UP, (Section(size),) * 2, has_bias),
            gated_activation(self.config, activation_field),
            self.linear(prefix, size, {"down_proj": hidden}, has_bias),
        )

    def plain_mlp(
        self, prefix: str, up: str, down: str, activation_field: str, has_bias: bool
    ) -> MLP:
        hidden, size = self.config.hidden_size, self.config.intermediate_size
        return MLP(
            self.linear(prefix, hidden, {up: size}, has_bias),
            activation(self.config, activation_field),
            self.linear(prefix, size, {down: hidden}, has_bias),
        )

    def window(self, index: int) -> int | None:
        """The sliding window of a layer, by the config's layer_types if it has them."""
        window: int | None = declared(self.config, "sliding_window")
        types = declared(self.config, "layer_types")
        if types is None or types[index] == "sliding_attention":
            return window
        if types[index] == "full_attention":
            return None
        raise ValueError(
            f"layer_types[{index}]={types[index]!r} is not supported: it must be one of "
            "'full_attention', 'sliding_attention'"
        )

    # -- what the engine uses ----------------------------------------------------------------

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct sliding windows of the layers."""
        return tuple(dict.fromkeys(layer.attention.window for layer in self.layers))

    @property
    def embedding(self) -> Tensor:
        """[vocab_size, hidden_size]"""
        return self.tokens.rows

    def units(self) -> Iterator[Module]:
        for unit in super().units():
            if unit is not self.lm_head or not self.is_tied:
                yield unit

    def named_weights(self) -> NamedPlaces:
        for unit in self.units():
            yield from unit.named_weights()

    def current_name(self, name: str) -> str:
        """What named_weights calls a tensor that an older checkpoint has by another name."""
        for old, new in self.OTHER_PREFIXES.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        # The body's prefix is missing where it was saved without the head.
        body = self.LAYERS.rpartition(".")[0] + "."
        for part in (self.LAYERS, self.EMBEDDING, self.FINAL_NORM):
            if name.startswith(part.removeprefix(body) + "."):
                return body + name
        for old, new in self.OTHER_PARTS.items():
            name = name.replace(old, new)
        return name

    def is_ignored(self, name: str) -> bool:
        """Whether a checkpoint tensor without a place is left out knowingly."""
        return name.endswith(self.IGNORED_SUFFIXES) or name.startswith(self.IGNORED_PREFIXES)

    def copies(self) -> dict[str, Tensor]:
        """By name, checkpoint tensors that may be there once more, and what they must be like."""
        return {f"{self.HEAD}.weight": self.embedding} if self.is_tied else {}

    def finish_loading(self) -> None:
        if self.is_tied:
            self.lm_head.tie(self.embedding)
            self.lm_head.finish_loading()

    def forward(self, token_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        """token_ids, positions int64 [num_tokens] -> hidden states [num_tokens, hidden]."""
        x = self.embed(token_ids, positions, batch)
        residual = torch.zeros_like(x)
        for layer in self.layers:
            x = layer(x, residual, positions, batch)
        return self.norm.add(x, residual)
