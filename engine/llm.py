"""The offline API: prompts in, outputs back, in one process. Everything else is behind EngineCore."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from loraplex.engine.config import EngineConfig
from loraplex.engine.core import EngineCore
from loraplex.engine.input_processor import InputProcessor, Prompt, prompt_text
from loraplex.engine.output_processor import OutputProcessor
from loraplex.engine.outputs import RequestOutput
from loraplex.engine.request import (
    EngineOutput,
    EngineRequest,
    FinishReason,
    LoRARequest,
    RequestError,
    describe,
)
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.tokenizer import Tokenizer, load_tokenizer

Message = dict[str, Any]
WAIT_SECONDS = 0.1


class LLM:
    """A model that generates text, with any adapter for any prompt.

    Options are the fields of EngineConfig, by keyword. Raises ValueError for one that is unknown or
    not allowed. One thread at a time may use it. It is a context manager that shuts down.
    """

    def __init__(self, model: str, **options: Any) -> None:
        config = EngineConfig.from_options(model=model, **options)
        core = EngineCore(config)
        tokenizer = None
        if not config.skip_tokenizer_init:
            tokenizer = load_tokenizer(core.model_info.tokenizer_path)
        self._attach(core, tokenizer, config.seed)

    @classmethod
    def from_core(cls, core: EngineCore, tokenizer: Tokenizer | None, seed: int = 0) -> Self:
        """An LLM on a core that is there already."""
        llm = cls.__new__(cls)
        llm._attach(core, tokenizer, seed)
        return llm

    def _attach(self, core: EngineCore, tokenizer: Tokenizer | None, seed: int) -> None:
        self._core = core
        self._tokenizer = tokenizer
        self._input_processor = InputProcessor(core.model_info, tokenizer, seed)
        self._output_processor = OutputProcessor(tokenizer)
        self._request_ids = map(str, itertools.count())

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        use_tqdm: bool = True,
        return_errors: bool = False,
    ) -> list[RequestOutput]:
        """Complete the prompts; one RequestOutput each, in their order.

        prompts: one or several of: a string, a list of token ids, {"prompt": text},
            {"prompt_token_ids": ids}.
        sampling_params: for all, or one for each prompt.
        lora_request: the adapter for all, or one for each prompt, None being the base model.
        return_errors: a request that fails has its `error` in its output. Without it the error is
            raised: at once if the request is seen to be wrong before any runs, and otherwise when
            the other requests have finished.
        """
        prompts = _as_list(prompts)
        params = _one_for_each("sampling_params", sampling_params or SamplingParams(), len(prompts))
        lora_requests = _one_for_each("lora_request", lora_request, len(prompts))
        outputs: dict[str, RequestOutput] = {}
        requests: list[tuple[str | None, list[EngineRequest]]] = []
        for prompt, param, lora in zip(prompts, params, lora_requests, strict=True):
            request_id = next(self._request_ids)
            outputs[request_id] = RequestOutput(request_id, prompt_text(prompt), [], [], True, lora)
            try:
                engine_requests = self._input_processor.process(request_id, prompt, param, lora)
                requests.append((prompt_text(prompt), engine_requests))
            except ValueError as error:
                if not return_errors:
                    raise
                outputs[request_id].error = error
        for output in self._run(requests, use_tqdm):
            outputs[output.request_id] = output
        for output in outputs.values():
            if output.error is not None and not return_errors:
                raise output.error
        return list(outputs.values())

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        use_tqdm: bool = True,
        return_errors: bool = False,
        **chat_template_options: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several; see generate.

        messages: dicts with "role" and "content"; several conversations are a list of lists.
        chat_template_options: what the model's chat template takes, and add_generation_prompt.
        """
        tokenizer = self.get_tokenizer()
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts: list[Prompt] = []
        for conversation in conversations:
            token_ids = tokenizer.apply_chat_template(list(conversation), **chat_template_options)
            text = tokenizer.decode(token_ids, skip_special_tokens=False)
            prompts.append({"prompt": text, "prompt_token_ids": token_ids})
        return self.generate(prompts, sampling_params, lora_request, use_tqdm, return_errors)

    def stats(self) -> dict[str, Any]:
        """Page counts by state, numbers of requests, and counters since the start."""
        return self._core.stats()

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer. ValueError if there is none, by skip_tokenizer_init."""
        if self._tokenizer is None:
            raise ValueError("there is no tokenizer: skip_tokenizer_init=True left it out")
        return self._tokenizer

    def shutdown(self) -> None:
        """Give back memory and threads; the LLM is of no use afterwards."""
        self._core.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    def _run(
        self, requests: list[tuple[str | None, list[EngineRequest]]], use_tqdm: bool
    ) -> Iterator[RequestOutput]:
        """Outputs as requests finish. What is left when the caller gives up is aborted."""
        core, processor = self._core, self._output_processor
        unfinished: set[str] = set()
        progress = tqdm(total=len(requests), disable=not use_tqdm, unit="request")
        num_output_tokens = 0
        with progress, _interrupts_between_steps() as check_interrupt:
            try:
                refused: list[EngineOutput] = []
                for prompt, engine_requests in requests:
                    unfinished.add(processor.add_request(prompt, engine_requests, stream=False))
                    refused += self._submit(engine_requests)
                outputs = refused
                while unfinished:
                    processed = processor.process_outputs(outputs)
                    core.abort_requests(processed.aborts)
                    for output in processed.request_outputs:
                        unfinished.remove(output.request_id)
                        num_output_tokens += sum(len(c.token_ids) for c in output.outputs)
                        ...
            finally:
                for request_id in unfinished:
                    core.abort_requests(processor.abort_request(request_id))
