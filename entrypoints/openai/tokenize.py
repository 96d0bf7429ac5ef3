"""POST /tokenize and /detokenize as vLLM has them. LoRAX has a /tokenize, too: a body with `inputs`
is its."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Discriminator, Tag

from loraplex.entrypoints.http.serving import Serving
from loraplex.entrypoints.http.streaming import json_response
from loraplex.entrypoints.lorax import routes as lorax_routes
from loraplex.entrypoints.lorax.requests import TokenizeRequest as LoraxTokenizeRequest
from loraplex.entrypoints.openai.chat_plan import encode_conversation, tokenizer_of
from loraplex.entrypoints.openai.chat_requests import Conversation
from loraplex.entrypoints.openai.requests import ModelRequest

router = APIRouter()


def _base_if_null(value: Any) -> Any:
    return "" if value is None else value


class TokenizerRequest(ModelRequest):
    """What the bodies have in common."""

    model: Annotated[str, BeforeValidator(_base_if_null)] = ""


class TokenizeText(TokenizerRequest):
    """A text to tokenise."""

    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(Conversation, TokenizerRequest):
    """A conversation to tokenise."""

    return_token_strs: bool = False


class DetokenizeRequest(TokenizerRequest):
    """Body of POST /detokenize."""

    tokens: list[int]


def _kind(body: Any) -> str:
    if isinstance(body, dict) and "inputs" in body:
        return "lorax"
    return "chat" if isinstance(body, dict) and "messages" in body else "text"


TokenizeBody = Annotated[
    Annotated[LoraxTokenizeRequest, Tag("lorax")]
    | Annotated[TokenizeChat, Tag("chat")]
    | Annotated[TokenizeText, Tag("text")],
    Discriminator(_kind),
]


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request) -> Response:
    """The tokens of a text or of a conversation."""
    serving: Serving = request.app.state.serving
    if isinstance(body, LoraxTokenizeRequest):
        return await lorax_routes.tokenize(body, request)
    lora_request = body.find_adapter(serving.models)
    if isinstance(body, TokenizeText):
        tokenizer = await serving.tokenizer_of(lora_request)
        token_ids = await serving.encode(body.prompt, body.add_special_tokens, tokenizer)
    else:
        tokenizer = await tokenizer_of(serving, body, lora_request)
        token_ids = await encode_conversation(serving, body, tokenizer)
    answer = {
        "count": len(token_ids),
        "max_model_len": serving.engine.model_info.max_model_len,
        "tokens": token_ids,
        "token_strs": None,
    }
    if body.return_token_strs:
        answer["token_strs"] = [
            tokenizer.decode([token_id], skip_special_tokens=False) for token_id in token_ids
        ]
    return json_response(answer)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of tokens, special ones among them."""
    serving: Serving = request.app.state.serving
    lora_request = body.find_adapter(serving.models)
    tokenizer = await serving.tokenizer_of(lora_request)
    vocab_size = serving.engine.model_info.vocab_size
    for token_id in body.tokens:
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"tokens={token_id} is not allowed: it must be 0 to {vocab_size - 1}")
    return json_response({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)})
