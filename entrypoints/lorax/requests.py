"""The bodies that LoRAX's routes take, and what they ask of the engine.

A field that is not honoured is refused by name, unless it is null.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from loraplex.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from loraplex.engine.structured_outputs.params import StructuredOutputsParams

# How LoRAX itself calls a request without an adapter.
BASE_MODEL_ID = "__base_model__"


class LoraxModel(BaseModel):
    """A JSON object whose values have the very types; unknown fields may be there if null."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


def refuse(field: str, value: Any, allowed: str) -> PydanticCustomError:
    return PydanticCustomError(
        "not_allowed",
        "{name}={value} is not allowed: it must be {allowed}",
        {"name": field, "value": repr(value), "allowed": allowed},
    )


class MergeParameters(LoraxModel):
    """Adapters that are used as one."""

    ids: Annotated[list[str], Field(min_length=1)]
    weights: list[float]
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] = "linear"
    density: Annotated[float, Field(ge=0, le=1)] = 0.0
    majority_sign_method: Literal["total", "frequency"] = "total"

    @model_validator(mode="after")
    def check_together(self) -> MergeParameters:
        if len(self.weights) != len(self.ids):
            raise refuse("weights", self.weights, "one weight for each of ids")
        if self.density == 0 and self.merge_strategy != "linear":
            raise refuse("density", 0, f"above 0 with merge_strategy={self.merge_strategy!r}")
        return self

    @property
    def effective_density(self) -> float:
        """Of what is kept; "linear" keeps all."""
        return 1.0 if self.merge_strategy == "linear" else self.density


class ResponseFormat(LoraxModel):
    """What the text must look like; the values are also written as LoRAX's own code names them."""

    type: Literal["text", "json_object", "json_schema", "Text", "JsonObject", "JsonSchema"]
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    def structured_outputs(self) -> StructuredOutputsParams | None:
        """Without a schema, any JSON object. Raises ValueError for one that is not allowed."""
        if self.type in ("text", "Text"):
            return None
        if not self.schema_:
            return StructuredOutputsParams(json_object=True)
        return StructuredOutputsParams(json=self.schema_)


class AdapterParameters(LoraxModel):
    """Which adapter a request wants."""

    adapter_id: str | None = None
    adapter_source: str | None = None
    merged_adapters: MergeParameters | None = None
    api_token: str | None = Field(default=None, repr=False)

    @model_validator(mode="after")
    def check_adapter(self) -> AdapterParameters:
        if self.merged_adapters is not None and self.base_or_adapter_id is not None:
            raise refuse("adapter_id", self.adapter_id, "left out with merged_adapters")
        return self

    @property
    def base_or_adapter_id(self) -> str | None:
        """The adapter's id; None for the base model."""
        return None if self.adapter_id in (None, "", BASE_MODEL_ID) else self.adapter_id


class GenerateParameters(AdapterParameters):
    """What a request may ask for; the defaults are LoRAX's."""

    best_of: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    typical_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    do_sample: bool = False
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    ignore_eos_token: bool = False
    return_full_text: bool = False
    stop: list[Annotated[str, Field(min_length=1)]] = []
    truncate: Annotated[int, Field(ge=1)] | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    return_k_alternatives: Annotated[int, Field(ge=1, le=MAX_LOGPROBS)] | None = None
    apply_chat_template: bool = False
    response_format: ResponseFormat | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None

    @model_validator(mode="after")
    def check_together(self) -> GenerateParameters:
        if self.typical_p < 1:
            raise refuse("typical_p", self.typical_p, "1: this server has no typical sampling")
        if self.watermark:
            raise refuse("watermark", True, "false: this server marks no text")
        if self.best_of > 1 and not self.samples:
            raise refuse("best_of", self.best_of, "1 without sampling (do_sample=true)")
        if self.best_of > 1 and self.seed is not None:
            raise refuse("seed", self.seed, "left out with best_of above 1")
        return self

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn; else the likeliest is taken."""
        if self.temperature == 0:
            return False
        is_shaped = self.top_k is not None or self.top_p < 1
        return self.do_sample or self.temperature != 1 or is_shaped

    @property
    def wants_tokens(self) -> bool:
        """Whether an answer in one piece lists its tokens."""
        return self.details or self.decoder_input_details

    def sampling_params(self, stream: bool) -> SamplingParams:
        """Raises ValueError for a value that is not allowed."""
        seed = secrets.randbits(64) if self.seed is None and self.samples else self.seed
        needs_logprobs = stream or self.wants_tokens or self.best_of > 1
        form = self.response_format
        return SamplingParams(
            n=self.best_of,
            temperature=self.temperature if self.samples else 0.0,
            top_k=self.top_k or 0,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            seed=seed,
            stop=self.stop,
            include_stop_str_in_output=True,
            max_tokens=self.max_new_tokens,
            ignore_eos=self.ignore_eos_token,
            logprobs=(self.return_k_alternatives or 0) if needs_logprobs else None,
            prompt_logprobs=0 if self.decoder_input_details else None,
            structured_outputs=None if form is None else form.structured_outputs(),
            # A stream's tokens get their text one by one; the stop strings need all of it.
            detokenize=not stream or bool(self.stop),
        )


class GenerateRequest(LoraxModel):
    """Body of POST /generate and /generate_stream."""

    inputs: Annotated[str, Field(min_length=1)]
    parameters: GenerateParameters = Field(default_factory=GenerateParameters)


class CompatGenerateRequest(GenerateRequest):
    """Body of POST /, which may be a stream or not."""

    stream: bool = False


class TokenizeRequest(LoraxModel):
    """Body of POST /tokenize."""

    inputs: str
    add_special_tokens: bool = True


class EmbedRequest(LoraxModel):
    """Body of POST /embed."""

    inputs: Annotated[str, Field(min_length=1)]
    parameters: AdapterParameters = Field(default_factory=AdapterParameters)
    stream: bool = False


def _one_or_several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ClassifyRequest(LoraxModel):
    """Body of POST /classify and /classify_batch."""

    inputs: Annotated[list[str], BeforeValidator(_one_or_several)]
    stream: bool = False
