"""Requests for the fake device's adapters, and what their versions compute."""

from __future__ import annotations

import dataclasses

from fake_device import expected_tokens, make_request, run_to_end

from loraplex.engine.core import EngineCore
from loraplex.engine.messages import EngineOutput, EngineRequest

PATH = "a:pages=2"


def request_of(
    request_id: str, adapter: str | None = "a", token: str | None = None, max_tokens: int = 4
) -> EngineRequest:
    request = make_request(request_id, range(12), max_tokens, adapter=adapter)
    if token is not None:
        request.lora_request = dataclasses.replace(request.lora_request, token=token)
    return request


def tokens_of_version(request: EngineRequest, version: int) -> list[int]:
    """What a request gets from a version of its adapter, run alone."""
    name = request.lora_request.lora_name
    adapter = f"{name}@{version}" if version else name
    prompt, max_tokens = request.prompt_token_ids, request.max_tokens
    return expected_tokens(make_request("r", prompt, max_tokens, adapter=adapter))


def finish(core: EngineCore, request: EngineRequest) -> list[EngineOutput]:
    core.add_request(request)
    return run_to_end(core)[request.request_id]
