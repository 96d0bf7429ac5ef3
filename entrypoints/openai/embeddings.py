"""POST /v1/embeddings: pooled hidden states of prompts, of the base model or an adapter."""

from __future__ import annotations

import base64
from contextlib import aclosing
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator

from loraplex.engine.messages import Service
from loraplex.engine.outputs import RequestOutput
from loraplex.engine.sampling_params import SamplingParams
from loraplex.entrypoints.http.serving import Serving
from loraplex.entrypoints.http.streaming import json_response, merge, unless_disconnected
from loraplex.entrypoints.openai.requests import IGNORED_FIELDS, ModelRequest, parse_prompts

router = APIRouter()


class EmbeddingRequest(ModelRequest):
    """Body of POST /v1/embeddings."""

    neutral_values = {"dimensions": ()}
    ignored_fields = IGNORED_FIELDS

    input: Annotated[list[str | list[int]], BeforeValidator(parse_prompts)]
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Literal["last", "mean"] | None = None
    """Ours: of which tokens' hidden states the embedding is made."""
    priority: int | None = None


class Embedding(msgspec.Struct):
    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


@router.post("/v1/embeddings")
async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """The embeddings of a text, or of several."""
    serving: Serving = request.app.state.serving
    return json_response(await unless_disconnected(request.receive, _embed(serving, body)))


async def _embed(serving: Serving, body: EmbeddingRequest) -> EmbeddingList:
    lora_request = body.find_adapter(serving.models)
    params = SamplingParams(pooling=body.pooling or "last", temperature=0, detokenize=False)
    serving.limits.check_batch(len(body.input), params)
    service = Service(priority=body.priority or 0)
    prompts = []
    for prompt in body.input:
        if isinstance(prompt, str):
            tokenizer = await serving.tokenizer_of(lora_request)
            prompt = await serving.encode(prompt, tokenizer=tokenizer)
        prompts.append(prompt)
    outputs: dict[int, RequestOutput] = {}
    streams = [serving.generate(p, params, lora_request, service, stream=False) for p in prompts]
    async with aclosing(merge(streams)) as merged:
        async for index, output in merged:
            outputs[index] = output
    num_tokens = sum(len(prompt) for prompt in prompts)
    return EmbeddingList(
        data=[
            Embedding(index, _encode(outputs[index].embedding or [], body.encoding_format))
            for index in range(len(prompts))
        ],
        model=body.model,
        usage=EmbeddingUsage(num_tokens, num_tokens),
    )


def _encode(embedding: list[float], encoding_format: str | None) -> Any:
    if encoding_format != "base64":
        return embedding
    return base64.b64encode(np.array(embedding, "<f4").tobytes()).decode()
