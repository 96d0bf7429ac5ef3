"""A byte tokenizer and an engine core without a model, for tests of everything in front of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from loraplex.engine.errors import RequestError
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import (
    EngineOutput,
    EngineRequest,
    FinishReason,
    ModelInfo,
    TokenLogprobs,
)

BOS, EOS, TURN = 256, 257, 258
SPECIAL = {BOS: "<s>", EOS: "</s>", TURN: "<turn>"}


class ByteTokenizer:
    """Every byte of UTF-8 is a token; special ones follow, of which three have names."""

    def __init__(self) -> None:
        self.vocab_size = 259
        self.chat_template = "{{ tools }} <tool_call> <think> </think>"
        self.opening = ""
        self.eos_token_ids = [EOS]
        self.num_decoded_tokens = 0

    def with_chat_template(self, chat_template: str) -> ByteTokenizer:
        """Whatever the template is, a conversation begins with it."""
        other = copy.copy(self)
        other.chat_template = other.opening = chat_template
        return other

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = True
    ) -> list[tuple[int, int, int]]:
        tokens = [(BOS, 0, 0)] * add_special_tokens
        for position, character in enumerate(text):
            tokens += [(byte, position, position + 1) for byte in character.encode()]
        return tokens

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.num_decoded_tokens += len(token_ids)
        data = b"".join(
            bytes([t])
            if t < 256
            else b""
            if skip_special_tokens
            else SPECIAL.get(t, f"<{t}>").encode()
            for t in token_ids
        )
        return data.decode(errors="replace")

    def apply_chat_template(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        prefix = self.opening + kwargs.pop("system", "")
        prefix += "".join(f"{d['text']}, " for d in kwargs.pop("documents", []))
        prefix += "".join(f"{t['function']['name']}, " for t in kwargs.pop("tools", []))
        if kwargs:
            raise ValueError(f"the template knows no {sorted(kwargs)}")
        token_ids = [BOS, *prefix.encode()]
        for message in messages:
            calls = [call["function"] for call in message.get("tool_calls", [])]
            content = message["content"] + "".join(f"{c['name']} {c['arguments']}" for c in calls)
            token_ids += [TURN, *f"{message['role']}: {content}".encode()]
        return token_ids + [TURN, *b"assistant: "] * add_generation_prompt


def echo(request: EngineRequest) -> list[int]:
    """The prompt's text tokens over again, then end of sequence."""
    return [t for t in request.prompt_token_ids if t < 256] + [EOS]


class FakeCore:
    """Keeps the contract of EngineCore: one token per step and running request, out of
    `reply(request)` (by default the prompt, then EOS; a reply that is used up goes on with EOS).

    A request with an adapter waits `num_load_steps` steps, in which step() may return []; an
    adapter path with "missing" in it is refused by add_request, one with "broken" fails in step().
    At most max_num_seqs run at once, in order of arrival. Log-probabilities: the chosen token has
    -0.5, the n likeliest are tokens 0..n-1 with -1, -2, ...
    """

    def __init__(
        self,
        reply: Callable[[EngineRequest], list[int]] = echo,
        max_model_len: int = 1024,
        max_num_seqs: int = 8,
        num_load_steps: int = 2,
    ) -> None:
        self.model_info = ModelInfo(
            model_name="fake",
            tokenizer_path="",
            max_model_len=max_model_len,
            vocab_size=259,
            eos_token_ids=[EOS],
            dtype="float32",
            device="cpu",
        )
        self.requests: dict[str, EngineRequest] = {}
        """The unfinished ones."""
        self.seen: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.loaded: dict[str, dict[str, Any]] = {}
        self.refreshed: list[str] = []
        self.located: list[str] = []
        self.num_steps = 0
        self.num_waits = 0
        self.is_shut_down = False
        self.on_step: Callable[[], None] = lambda: None
        """Called at the beginning of every step."""
        self._reply = reply
        self._max_num_seqs = max_num_seqs
        self._num_load_steps = num_load_steps
        self._num_done: dict[str, int] = {}
        self._load_steps_left: dict[str, int] = {}
        self._abort_outputs: list[EngineOutput] = []

    def add_request(self, request: EngineRequest) -> None:
        assert request.request_id not in self.requests
        if request.lora_request is not None:
            if "missing" in request.lora_request.lora_path:
                raise RequestError(f"no adapter {request.lora_request.lora_name!r}", 404)
            self._load_steps_left[request.request_id] = self._num_load_steps
        self.seen.append(request)
        self.requests[request.request_id] = request
        self._num_done[request.request_id] = 0

    def abort_requests(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if self.requests.pop(request_id, None) is not None:
                self.aborted.append(request_id)
                self._abort_outputs.append(
                    EngineOutput(
                        request_id=request_id, new_token_ids=[], finish_reason=FinishReason.ABORT
                    )
                )

    def step(self) -> list[EngineOutput]:
        self.on_step()
        self.num_steps += 1
        outputs, self._abort_outputs = self._abort_outputs, []
        for request in list(self.requests.values())[: self._max_num_seqs]:
            left = self._load_steps_left.get(request.request_id, 0)
            if left:
                self._load_steps_left[request.request_id] = left - 1
                continue
            output = self._advance(request)
            outputs.append(output)
            if output.finish_reason is not None:
                del self.requests[request.request_id]
        return outputs

    def _advance(self, request: EngineRequest) -> EngineOutput:
        params = request.sampling_params
        if request.lora_request is not None and "broken" in request.lora_request.lora_path:
            return EngineOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=FinishReason.ERROR,
                error=f"adapter {request.lora_request.lora_name!r} does not fit",
                error_status=400,
            )
        num_done = self._num_done[request.request_id] + 1
        self._num_done[request.request_id] = num_done
        reply = self._reply(request)
        token_id = reply[num_done - 1] if num_done <= len(reply) else EOS
        output = EngineOutput(
            request_id=request.request_id,
            new_token_ids=[token_id],
            num_cached_tokens=len(request.prompt_token_ids) // 2,
            first_scheduled_time=time.monotonic(),
        )
        if params.logprobs is not None:
            output.logprobs = [_logprobs(token_id, params.logprobs)]
        if params.prompt_logprobs is not None and num_done == 1:
            output.prompt_logprobs = [
                _logprobs(t, params.prompt_logprobs) for t in request.prompt_token_ids[1:]
            ]
        if num_done >= params.min_tokens and token_id in params.stop_token_ids:
            output.finish_reason, output.stop_reason = FinishReason.STOP, token_id
        elif (
            num_done >= params.min_tokens
            and token_id in request.eos_token_ids
            and not params.ignore_eos
        ):
            output.finish_reason = FinishReason.STOP
        elif num_done >= request.max_tokens:
            output.finish_reason = FinishReason.LENGTH
        return output

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests or self._abort_outputs)

    def wait_for_work(self, timeout: float) -> None:
        assert timeout > 0
        self.num_waits += 1

    def stats(self) -> dict[str, Any]:
        return {
            "pages_total": 10,
            "pages_free": 10 - len(self.requests),
            "pages_kv": len(self.requests),
            "pages_kv_cached": 0,
            "pages_adapter": 0,
            "pages_adapter_idle": 0,
            "num_running": min(len(self.requests), self._max_num_seqs),
            "num_waiting": max(0, len(self.requests) - self._max_num_seqs),
        }

    def adapters(self) -> list[dict[str, Any]]:
        return list(self.loaded.values())

    def preload_adapter(
        self, lora_request: LoRARequest, tier: str = "pool", pin: bool = False
    ) -> Future[dict[str, Any]]:
        """Done at once; fails for paths that requests fail for."""
        done: Future[dict[str, Any]] = Future()
        if "missing" in lora_request.lora_path or "broken" in lora_request.lora_path:
            done.set_exception(RequestError(f"no adapter {lora_request.lora_name!r}", 404))
            return done
        self.loaded[lora_request.lora_path] = {
            "references": [f"file:{lora_request.lora_path}"],
            "pinned": tier if pin else None,
            "tier": tier,
            "lora_name": lora_request.lora_name,
            "num_pages": 1,
            "num_requests": 0,
            "num_running": 0,
        }
        done.set_result(self.loaded[lora_request.lora_path])
        return done

    def locate_adapter(
        self, lora_request: LoRARequest, known_version: str = ""
    ) -> Future[dict[str, Any]]:
        """Done at once, in a directory that has nothing of its own."""
        done: Future[dict[str, Any]] = Future()
        self.located.append(lora_request.lora_path)
        if "missing" in lora_request.lora_path:
            done.set_exception(RequestError(f"no adapter {lora_request.lora_name!r}", 404))
        else:
            done.set_result({"directory": "/nowhere", "version": lora_request.lora_path})
        return done

    def unpin_adapter(self, lora_request: LoRARequest) -> dict[str, Any]:
        state = self.loaded.get(lora_request.lora_path)
        if state is None or state["pinned"] is None:
            raise RequestError(f"adapter {lora_request.lora_name!r} is not pinned", 404)
        state["pinned"] = None
        return state

    def refresh_adapter(self, lora_request: LoRARequest) -> Future[dict[str, Any]]:
        self.refreshed.append(lora_request.lora_path)
        return self.preload_adapter(lora_request)

    def unload_adapter(
        self, lora_request: LoRARequest, abort: bool = False, delete_files: bool = False
    ) -> dict[str, Any]:
        """With abort, all requests end."""
        self.loaded.pop(lora_request.lora_path, None)
        if abort:
            self.abort_requests(list(self.requests))
        return {"num_requests": 0}

    def check_integrity(self) -> None:
        assert set(self.requests) <= set(self._num_done)

    def shutdown(self) -> None:
        self.is_shut_down = True


def _logprobs(token_id: int, num_logprobs: int) -> TokenLogprobs:
    likeliest = list(range(num_logprobs))
    return TokenLogprobs(
        token_ids=[token_id, *likeliest],
        logprobs=[-0.5, *(-1.0 - i for i in likeliest)],
        ranks=[7, *(1 + i for i in likeliest)],
    )
