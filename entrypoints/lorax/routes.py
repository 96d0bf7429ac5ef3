"""LoRAX's native routes over the engine."""

from __future__ import annotations

import time
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

import loraplex
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import Service
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.text.tokenizer import Tokenizer
from loraplex.entrypoints.http.access_log import current_visit
from loraplex.entrypoints.http.errors import LoraxError, to_lorax_error
from loraplex.entrypoints.http.serving import Serving
from loraplex.entrypoints.http.streaming import EventStream, json_response, unless_disconnected
from loraplex.entrypoints.lorax.adapters import find_adapter
from loraplex.entrypoints.lorax.answers import GenerateAnswer
from loraplex.entrypoints.lorax.requests import (
    AdapterParameters,
    ClassifyRequest,
    CompatGenerateRequest,
    EmbedRequest,
    GenerateParameters,
    GenerateRequest,
    TokenizeRequest,
)
from loraplex.entrypoints.lorax.responses import Info, SimpleToken

router = APIRouter()


@router.post("/")
@router.post("/invocations")
async def compat_generate(body: CompatGenerateRequest, request: Request) -> Response:
    """Continue a text: as a stream, or as a list of one answer."""
    return await _generate(body, request, body.stream, in_list=True)


@router.post("/generate")
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Continue a text."""
    return await _generate(body, request, stream=False)


@router.post("/generate_stream")
async def generate_stream(body: GenerateRequest, request: Request) -> Response:
    """Continue a text, token by token."""
    return await _generate(body, request, stream=True)


async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The tokens of a text, and where they are in it."""
    serving: Serving = request.app.state.serving
    tokens = await serving.encode_with_offsets(body.inputs, body.add_special_tokens)
    return json_response([SimpleToken(i, body.inputs[a:b], a, b) for i, a, b in tokens])


@router.get("/info")
async def info(request: Request) -> Response:
    """The model and the limits."""
    serving: Serving = request.app.state.serving
    engine, model = serving.engine, serving.engine.model_info
    waiting = engine.config.max_num_waiting
    return json_response(
        Info(
            model_id=engine.config.model,
            model_sha=engine.config.revision,
            model_dtype=f"torch.{model.dtype}",
            model_device_type=model.device,
            model_pipeline_tag="text-generation",
            max_concurrent_requests=(
                None if waiting is None else waiting + engine.config.max_num_seqs
            ),
            max_best_of=serving.limits.max_completions,
            max_stop_sequences=serving.limits.max_stop_sequences,
            max_input_length=model.max_model_len - 1,
            max_total_tokens=model.max_model_len,
            max_batch_total_tokens=(await engine.stats())["pages_total"] * engine.config.block_size,
            version=loraplex.__version__,
        )
    )


@router.post("/embed")
async def embed(body: EmbedRequest, request: Request) -> Response:
    """The embedding of a text: the last token's hidden state."""
    serving: Serving = request.app.state.serving
    work = _embed(serving, body.inputs, _adapter(request, body.parameters))
    return json_response({"embeddings": await unless_disconnected(request.receive, work)})


@router.post("/classify")
@router.post("/classify_batch")
async def classify(body: ClassifyRequest) -> Response:
    """Refused: the models that are served generate text."""
    raise LoraxError(
        422, "Input validation error: this model does not support classification",
        code="validation",
    )  # fmt: skip


# Of /tokenize, openai_tokenize has the route.
PATHS = frozenset(
    {"/tokenize", *(route.path for route in router.routes if isinstance(route, APIRoute))}
)


async def _generate(
    body: GenerateRequest, request: Request, stream: bool, in_list: bool = False
) -> Response:
    received_time = time.monotonic()
    serving: Serving = request.app.state.serving
    parameters = body.parameters
    if stream:
        _check_stream(parameters)
    lora_request = _adapter(request, parameters)
    tokenizer = await serving.tokenizer_of(lora_request)
    prompt_token_ids = await _encode(serving, body, tokenizer)
    answer = GenerateAnswer(
        serving, body, prompt_token_ids, lora_request, tokenizer, received_time, stream
    )
    if stream:
        return EventStream(answer.events(), answer.headers(), to_lorax_error, last=None)
    done = await unless_disconnected(request.receive, answer.whole())
    if done is None:
        # The client has left; nobody sees this.
        return Response(status_code=499)
    value, headers = done
    return json_response([value] if in_list else value, headers)


def _check_stream(parameters: GenerateParameters) -> None:
    for name, value in (
        ("best_of", parameters.best_of > 1),
        ("decoder_input_details", parameters.decoder_input_details),
    ):
        if value:
            raise ValueError(f"{name}={getattr(parameters, name)} is not allowed in a stream")


async def _encode(serving: Serving, body: GenerateRequest, tokenizer: Tokenizer) -> list[int]:
    if body.parameters.apply_chat_template:
        messages = [{"role": "user", "content": body.inputs}]
        token_ids = await serving.encode_chat(messages, True, {}, tokenizer)
    else:
        token_ids = await serving.encode(body.inputs, tokenizer=tokenizer)
    truncate = body.parameters.truncate
    return token_ids if truncate is None else token_ids[-truncate:]


async def _embed(serving: Serving, text: str, lora_request: LoRARequest | None) -> list[float]:
    tokenizer = await serving.tokenizer_of(lora_request)
    prompt = await serving.encode(text, tokenizer=tokenizer)
    params = SamplingParams(pooling="last", temperature=0, detokenize=False)
    outputs = serving.generate(prompt, params, lora_request, Service(), stream=False)
    async with aclosing(outputs):
        async for output in outputs:
            embedding = output.embedding
    return embedding or []


def _adapter(request: Request, parameters: AdapterParameters) -> LoRARequest | None:
    serving: Serving = request.app.state.serving
    return find_adapter(serving.models, parameters, _bearer_token(request))


def _bearer_token(request: Request) -> str | None:
    """LoRAX's clients send a hub token so; on a server with API keys it is one of those."""
    visit = current_visit.get()
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    is_key = visit is not None and visit.caller is not None
    return token.strip() or None if kind.lower() == "bearer" and not is_key else None
