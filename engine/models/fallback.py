"""Any other decoder-only architecture: transformers' implementation with our attention and linears.

transformers calls what is registered as its attention and mask functions. First a model without
memory ("outline") runs with functions that only record, which shows what its attention is, and
refuses what the engine cannot do. Then the model with weights runs with functions that go to the
batch. Its linears are replaced, so that adapters attach to them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from loraplex.engine.models.blocks import ForwardBatch, Heads
from loraplex.engine.models.fallback_layers import ServedLayer, ServedState

Tensor = torch.Tensor

SERVED_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}
RECORDING, SERVING = "loraplex_recording", "loraplex"
# What else may be said to attention, as it changes nothing: the mask has the window, and nothing is
# dropped.
NEUTRAL_OPTIONS = {
    "dropout", "is_causal", "output_attentions", "position_ids", "sliding_window", "use_cache",
}  # fmt: skip
# Those that may be None.
ABSENT_OPTIONS = {"encoder_hidden_states", "s_aux"}
# How far rows of a batch may be from what they are in another order, by rounding.
ORDER_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class _AttentionCall:
    """What a layer asks of attention."""

    module: nn.Module
    heads: Heads
    scale: float
    soft_cap: float
    window: int | None


class _NotServedError(ValueError):
    """Why an architecture is refused."""


class TransformersDecoder:
    """A model of transformers, to the engine like a Decoder."""

    supports_graphs = False
    OTHER_PARTS: Mapping[str, str] = {}

    def __init__(self, model: Any, calls: list[_AttentionCall], names: list[str]) -> None:
        """calls and names: of each layer's attention, in order."""
        self._model = model
        self._calls, self._names = calls, names
        self.heads, self.scale, self.logits_soft_cap = _the_one_attention(calls)
        windows = tuple(call.window for call in calls)
        self._state = ServedState(None, windows, model.get_input_embeddings().weight.dtype)
        self.windows = tuple(dict.fromkeys(self._state.windows))
        paths = [re.fullmatch(r"(.+)\.(\d+)\..+", name) for name in names]
        if not all(path and int(path[2]) == index for index, path in enumerate(paths)):
            raise _NotServedError(f"its attention is not in numbered layers: {', '.join(names)}")
        assert paths[0] is not None
        self.LAYERS = paths[0][1]
        self.layers = [
            ServedLayer(model.get_submodule(f"{self.LAYERS}.{index}"), prefix, self._state)
            for index, prefix in enumerate(f"{self.LAYERS}.{i}." for i in range(len(names)))
        ]
        for name in names:
            model.get_submodule(name).loraplex_state = self._state

    def with_weights(self, model: Any) -> TransformersDecoder:
        """The same for a model that has memory."""
        loaded = TransformersDecoder(model, self._calls, self._names)
        for outline, layer in zip(self.layers, loaded.layers, strict=True):
            if lost := outline.names() - layer.names():
                raise ValueError(f"{', '.join(lost)} of this model can't have adapters once loaded")
        return loaded

    @property
    def embedding(self) -> Tensor:
        weight: Tensor = self._model.get_input_embeddings().weight
        return weight

    def forward(self, token_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        """token_ids, positions int64 [num_tokens] -> hidden states [num_tokens, hidden]."""
        self._state.batch = batch
        try:
            output = self._model.get_decoder()(**_inputs(token_ids, positions))
        finally:
            self._state.batch = None
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor, batch: Any = None) -> Tensor:
        """hidden [num_rows, hidden] -> [num_rows, vocab_size] of the model's dtype.

        batch: as Decoder has it; here nobody wraps the head.
        """
        # The head's factors and caps are in the forward of the whole, so that it is run with a body
        # that has its result already.
        body = self._model.get_decoder()
        body.forward = lambda *_, **__: _BodyOutput(hidden[None])
        try:
            rows = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
            logits: Tensor = self._model(**_inputs(rows, rows)).logits[0]
        finally:
            del body.forward
        return logits


class _BodyOutput:
    """What a model's body gives, of whatever form its head expects: all but the result is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


def outline_fallback(hf_config: Any) -> TransformersDecoder:
    """The model without memory for its weights.

    Raises ValueError for an architecture that the engine cannot serve, and says why.
    """
    architectures = hf_config.architectures
    try:
        _check_config(hf_config)
        with torch.device("meta"):
            # In bfloat16, which kernels of experts want even here.
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(hf_config), attn_implementation=RECORDING, dtype=torch.bfloat16
            ).eval()
            if architectures != [type(model).__name__]:
                raise _NotServedError(f"what would generate text is a {type(model).__name__}")
            calls = _record(model)
        names = {module: name for name, module in model.named_modules()}
        return TransformersDecoder(model, calls, [names[call.module] for call in calls])
    except Exception as error:
        reason = (
            str(error)
            if isinstance(error, _NotServedError)
            else _shorten(
                f"its implementation fails with our attention ({type(error).__name__}: {error})"
            )
        )
        raise ValueError(
            f"architectures={architectures!r} of this model is not supported: it has no "
            f"implementation of its own here, and transformers' can't be served: {reason}"
        ) from error


def load_fallback(
    path: Path, hf_config: Any, dtype: torch.dtype, device: torch.device, is_dummy: bool
) -> TransformersDecoder:
    """The model with its weights. Raises ValueError like outline_fallback."""
    outline = outline_fallback(hf_config)
    options = {"dtype": dtype, "attn_implementation": SERVING}
    if is_dummy:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(hf_config), **options)
    else:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, output_loading_info=True, **options
        )
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"])[:5])
            raise ValueError(f"the checkpoint lacks tensors of the model: {missing}")
    decoder = outline.with_weights(model.to(device).eval())
    _check_that_only_attention_mixes_rows(decoder, hf_config.vocab_size, device)
    return decoder


def _check_config(hf_config: Any) -> None:
    if getattr(hf_config, "quantization_config", None) is not None:
        raise _NotServedError("quantised weights need an implementation of its own")
    if hf_config.is_encoder_decoder:
        raise _NotServedError("it is an encoder and a decoder")
    if other := set(getattr(hf_config, "layer_types", None) or ()) - SERVED_LAYER_TYPES:
        raise _NotServedError(
            f"it has layers of type {', '.join(map(repr, sorted(other)))}, and all must be of "
            + " or ".join(map(repr, sorted(SERVED_LAYER_TYPES)))
        )
    parameters = getattr(hf_config, "rope_parameters", None) or {}
    for rope in parameters.values() if "rope_type" not in parameters else (parameters,):
        rope_type = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
        if rope_type not in SERVED_ROPE_TYPES:
            raise _NotServedError(
                f"rope_type={rope_type!r} depends on the length of each request: it must be one of "
                + ", ".join(SERVED_ROPE_TYPES)
            )


def _shorten(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:297]}..."


def _inputs(
    token_ids: Tensor, positions: Tensor, mask_device: torch.device | None = None
) -> dict[str, Any]:
    """mask_device: None: that of the rest."""
    return {
        "input_ids": token_ids[None],
        "position_ids": positions[None],
        # Without one, transformers looks for several sequences in the positions.
        "attention_mask": torch.ones_like(token_ids[None], device=mask_device),
        "use_cache": False,
    }


# -- recording -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Mask:
    """In place of a mask, while recording: the function that says which keys a row sees."""

    visible: Callable[..., Tensor]


def _record(model: Any) -> list[_AttentionCall]:
    """What each layer asks of attention, in the order of their layer_idx."""
    calls: list[tuple[int, _AttentionCall]] = []
    max_positions = model.config.max_position_embeddings

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any,
               options: dict[str, Any]) -> None:  # fmt: skip
        if query.shape[-1] != value.shape[-1] or key.shape != value.shape:
            raise _NotServedError("its keys and values differ in shape")
        if not isinstance(mask, _Mask):
            raise _NotServedError("it makes its attention masks by itself")
        for name in options.keys() - NEUTRAL_OPTIONS - {"scaling", "softcap"}:
            if options[name] is not None or name not in ABSENT_OPTIONS:
                raise _NotServedError(f"its attention has an option of its own, {name}")
        heads = Heads(query.shape[1], key.shape[1], query.shape[-1])
        scale = options.get("scaling") or heads.head_dim**-0.5
        call = _AttentionCall(
            module, heads, scale, options.get("softcap") or 0.0, _window(mask, max_positions)
        )
        calls.append((getattr(module, "layer_idx", -1), call))

    for module in model.modules():
        module.loraplex_record = record
    tokens = torch.zeros(4, dtype=torch.int64)
    # The values of the mask may be looked at, even where no other tensor has any.
    model.get_decoder()(**_inputs(tokens, tokens, mask_device=torch.device("cpu")))
    calls.sort(key=lambda call: call[0])
    if [index for index, _ in calls] != list(range(model.config.num_hidden_layers)):
        raise _NotServedError(
            f"of its {model.config.num_hidden_layers} layers, {len(calls)} call transformers' "
            "attention interface, and each must once"
        )
    return [call for _, call in calls]


def _window(mask: _Mask, max_positions: int) -> int | None:
    """How many tokens a row sees, itself the last of them; None: all.

    Raises ValueError for a mask that is neither causal nor a sliding window.
    """
    with torch.device("cpu"):
        zero, keys = torch.tensor(0), torch.arange(max_positions)
        window = int(mask.visible(zero, zero, keys[-1], keys).expand(keys.shape).sum())
        for row in {0, 1, window - 1, window, max_positions // 2, max_positions - 1}:
            if 0 <= row < max_positions:
                expected = (keys <= row) & (keys > row - window)
                if not torch.equal(mask.visible(zero, zero, keys[row], keys), expected):
                    raise _NotServedError(
                        "its attention mask is neither causal nor a sliding window"
                    )
    return None if window == max_positions else window


def _the_one_attention(calls: list[_AttentionCall]) -> tuple[Heads, float, float]:
    kinds = {(call.heads, call.scale, call.soft_cap) for call in calls}
    if len(kinds) != 1:
        raise _NotServedError(f"its layers have {len(kinds)} kinds of attention, and must have one")
    return kinds.pop()


def _check_that_only_attention_mixes_rows(
    decoder: TransformersDecoder, vocab_size: int, device: torch.device
) -> None:
    """Rows of a batch are of many requests: the order of rows may only matter to attention."""
    tokens = torch.arange(4, device=device) % vocab_size
    positions = torch.arange(3, 7, device=device)
    with torch.inference_mode():
        there = decoder.forward(tokens, positions, _EachRowAlone()).float()
        back = decoder.forward(tokens.flip(0), positions.flip(0), _EachRowAlone()).float().flip(0)
    if (there - back).norm() > ORDER_TOLERANCE * there.norm():
        raise ValueError(
            "this model is not supported: tokens depend on each other outside of attention"
        )


class _EachRowAlone:
    """A batch whose tokens see themselves only."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None
    ) -> Tensor:
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).flatten(1)


# -- what transformers calls ---------------------------------------------------------------


def _record_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    module.loraplex_record(module, query, key, value, attention_mask, options)
    return query.transpose(1, 2), None


def _serve_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> tuple[Tensor, None]:
    """query [1, num_heads, num_tokens, head_dim] -> [1, num_tokens, num_heads, head_dim]."""
    state, layer = module.loraplex_state, module.layer_idx
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = state.batch.attend(layer, q, k, v, state.windows[layer])
    return out.view(1, *q.shape), None


AttentionInterface.register(RECORDING, _record_attention)
AttentionInterface.register(SERVING, _serve_attention)
AttentionMaskInterface.register(RECORDING, lambda *_, mask_function, **__: _Mask(mask_function))
AttentionMaskInterface.register(SERVING, lambda *_, **__: None)
