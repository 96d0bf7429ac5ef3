"""What every route that generates text needs: the engine, the served names, and the counting.

Knows no wire format.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from msgspec import structs

from loraplex.engine.async_engine import AsyncEngine, call_for_text
from loraplex.engine.beam_search import BeamSearchParams
from loraplex.engine.errors import RequestError
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import Service
from loraplex.engine.outputs import Logprob, RequestOutput
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.text.tokenizer import Tokenizer
from loraplex.entrypoints.http.access_log import Visit, current_visit
from loraplex.entrypoints.http.errors import ApiError, status_of
from loraplex.entrypoints.http.limits import Limits
from loraplex.entrypoints.http.metrics import ServerMetrics
from loraplex.entrypoints.http.model_registry import ModelRegistry


@dataclass(frozen=True)
class Serving:
    """One server's parts; app.state.serving is where the routes find it."""

    engine: AsyncEngine
    models: ModelRegistry
    metrics: ServerMetrics
    limits: Limits = field(default_factory=Limits)
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    trusts_chat_templates: bool = False

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ApiError 400 where the server runs without."""
        if self.engine.tokenizer is None:
            raise ApiError(
                400, "this server has no tokenizer (skip_tokenizer_init): give token ids"
            )
        return self.engine.tokenizer

    async def tokenizer_of(self, lora_request: LoRARequest | None) -> Tokenizer:
        """The adapter's tokenizer, or the base model's, for which the adapter may have to be
        fetched. Raises as `tokenizer` and AsyncEngine.tokenizer_of do, and ApiError 403."""
        visit = _admit(lora_request)
        started = time.monotonic()
        try:
            async with asyncio.timeout(self.limits.request_timeout):
                tokenizer = await self.engine.tokenizer_of(lora_request)
        except TimeoutError:
            raise RequestError(
                f"the adapter was not fetched within {self.limits.request_timeout:g} seconds",
                status=504,
            ) from None
        if visit is not None:
            visit.fetch_seconds += time.monotonic() - started
        return tokenizer or self.tokenizer

    async def encode(
        self, text: str, add_special_tokens: bool = True, tokenizer: Tokenizer | None = None
    ) -> list[int]:
        """The text's token ids. Raises ApiError 400 where the server runs without a tokenizer."""
        encode = partial((tokenizer or self.tokenizer).encode, text, add_special_tokens)
        return await call_for_text(encode, len(text))

    async def encode_with_offsets(
        self, text: str, add_special_tokens: bool
    ) -> list[tuple[int, int, int]]:
        """As Tokenizer.encode_with_offsets. Raises ApiError 404 where nobody knows offsets."""
        encode = partial(self.tokenizer.encode_with_offsets, text, add_special_tokens)
        try:
            return await call_for_text(encode, len(text))
        except ValueError as error:
            raise ApiError(404, str(error), code="no fast tokenizer") from error

    async def encode_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        options: dict[str, Any],
        tokenizer: Tokenizer | None = None,
    ) -> list[int]:
        """A conversation's token ids. Raises ValueError for what the template refuses."""
        encode = partial(
            (tokenizer or self.tokenizer).apply_chat_template,
            messages,
            add_generation_prompt,
            **options,
        )
        return await call_for_text(encode, len(repr((messages, options))))

    def check_max_tokens(
        self, num_prompt_tokens: int, max_tokens: int | None, field: str = "max_tokens"
    ) -> None:
        """Raises ValueError if the model's length leaves less than a client's `field` asks for."""
        max_model_len = self.engine.model_info.max_model_len
        left = max_model_len - num_prompt_tokens
        if max_tokens is not None and max_tokens > left > 0:
            raise ValueError(
                f"{field}={max_tokens} is not allowed: max_model_len={max_model_len} leaves "
                f"{left} for a prompt of {num_prompt_tokens} tokens"
            )

    def token_text(self, token_id: int, logprob: Logprob | None) -> str:
        """How answers name a token; without a tokenizer, by its id."""
        if logprob is not None and logprob.decoded_token is not None:
            return logprob.decoded_token
        if self.engine.tokenizer is None:
            return f"token_id:{token_id}"
        return self.engine.tokenizer.decode([token_id], skip_special_tokens=False)

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        lora_request: LoRARequest | None,
        service: Service,
        stream: bool,
        length_penalty: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """As AsyncEngine.generate, within the limits, and counted. With a length_penalty as
        AsyncEngine.beam_search, for what there is in sampling_params of its parameters."""
        self.limits.check_batch(1, sampling_params)
        sampling_params = self.limits.apply(sampling_params)
        adapter = "" if lora_request is None else lora_request.lora_name
        visit = _admit(lora_request)
        if visit is not None:
            visit.count_prompt(len(prompt_token_ids))
            if visit.caller is not None:
                service = structs.replace(service, tenant=visit.caller.key.name)
        self.metrics.request_started(adapter)
        output: RequestOutput | None = None
        options: dict[str, Any] = {
            "lora_request": lora_request,
            "service": service,
            "timeout": self.limits.request_timeout,
            "fetch_seconds": 0.0 if visit is None else visit.fetch_seconds,
        }
        if length_penalty is None:
            outputs = self.engine.generate(
                prompt_token_ids, sampling_params, stream=stream, **options
            )
        else:
            beams = BeamSearchParams(
                beam_width=sampling_params.n,
                max_tokens=sampling_params.max_tokens or self.engine.model_info.max_model_len,
                ignore_eos=sampling_params.ignore_eos,
                length_penalty=length_penalty,
            )
            outputs = self.engine.beam_search(prompt_token_ids, beams, **options)
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    yield output
        except Exception as error:
            self.metrics.request_failed(status_of(error))
            raise
        except BaseException:
            self.metrics.request_ended(output)
            raise
        finally:
            if visit is not None and output is not None:
                visit.count_output(output)
        self.metrics.request_ended(output)


def _admit(lora_request: LoRARequest | None) -> Visit | None:
    """The visit, to which the adapter is noted. Raises ApiError 403 for a caller's who may not use
    it, or one of those that are merged to it."""
    visit = current_visit.get()
    if visit is not None and lora_request is not None:
        visit.admit_adapters(part.lora_name for part in lora_request.parts)
    return visit
