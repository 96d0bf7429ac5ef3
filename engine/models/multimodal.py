"""The language models in checkpoints that also see images. Only text is served: what belongs to
images is not loaded. The config's text_config is the one that counts (see config.py)."""

from __future__ import annotations

from loraplex.engine.models.decoder import Decoder
from loraplex.engine.models.gemma import Gemma3ForCausalLM
from loraplex.engine.models.llama import Ministral3ForCausalLM


class _TextPart(Decoder):
    LAYERS = "model.language_model.layers"
    EMBEDDING = "model.language_model.embed_tokens"
    FINAL_NORM = "model.language_model.norm"
    OTHER_PREFIXES = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
    }
    IGNORED_PREFIXES = tuple(
        f"{prefix}{part}."
        for prefix in ("", "model.")
        for part in ("vision_tower", "multi_modal_projector")
    )


class Gemma3ForConditionalGeneration(_TextPart, Gemma3ForCausalLM):
    """Gemma 3 of 4B and more: text only."""


class Mistral3ForConditionalGeneration(_TextPart, Ministral3ForCausalLM):
    """Mistral Small 3.1 and later, and Ministral 3: text only."""

    SUPPORTED = {"model_type": ("mistral", "ministral3")}
