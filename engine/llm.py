"""The offline API: prompts in, outputs back, in one process. The engine is behind EngineCore."""

from __future__ import annotations

import gc
import itertools
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, SupportsIndex

from loraplex.engine.adapters.store import Tier
from loraplex.engine.beam_search import (
    BeamSearch,
    BeamSearchOutput,
    BeamSearchParams,
    run_searches,
)
from loraplex.engine.config import EngineConfig
from loraplex.engine.core import EngineCore
from loraplex.engine.errors import describe
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import EngineRequest, Service
from loraplex.engine.offline_loop import OfflineLoop, ProcessedPrompt
from loraplex.engine.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestOutput
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.text.adapter_tokenizers import AdapterTokenizers
from loraplex.engine.text.conversation import Message, check_messages
from loraplex.engine.text.input_processor import InputProcessor, Prompt, prompt_text
from loraplex.engine.text.output_processor import OutputProcessor
from loraplex.engine.text.tokenizer import Tokenizer, load_tokenizer


class LLM:
    """A model that generates text, with any adapter for any prompt.

    The options are EngineConfig's fields. Raises ValueError for one that is unknown or not allowed.
    Threads that use it take turns: one call of generate, chat or embed after the other. As a
    context manager it shuts down at the end.
    """

    def __init__(self, model: str | os.PathLike[str] = EngineConfig.model, **options: Any) -> None:
        config = EngineConfig.from_options(model=model, **options)
        core = EngineCore(config)
        tokenizer = None
        if not config.skip_tokenizer_init:
            tokenizer = load_tokenizer(core.model_info.tokenizer_path)
        # Or a garbage collection now and then goes through all modules, and a step takes 100 ms
        # more.
        gc.collect()
        gc.freeze()
        self._attach(core, tokenizer, config.seed)

    @classmethod
    def from_core(cls, core: EngineCore, tokenizer: Tokenizer | None, seed: int = 0) -> Self:
        """An LLM on a core that is there already."""
        llm = cls.__new__(cls)
        llm._attach(core, tokenizer, seed)
        return llm

    def _attach(self, core: EngineCore, tokenizer: Tokenizer | None, seed: int) -> None:
        self._open_loop: OfflineLoop | None = OfflineLoop(core, OutputProcessor(tokenizer))
        self._turn = threading.RLock()
        self._tokenizer = tokenizer
        self._input_processor = InputProcessor(core.model_info, tokenizer, seed)
        self._tokenizers = None
        if tokenizer is not None:
            self._tokenizers = AdapterTokenizers(tokenizer, core.model_info.tokenizer_path)
        self._request_ids = map(str, itertools.count())

    def get_default_sampling_params(self) -> SamplingParams:
        """Those that the model's generation_config.json recommends."""
        return SamplingParams(**self._core.model_info.default_sampling)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        use_tqdm: bool = True,
        return_errors: bool = False,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Complete the prompts; one RequestOutput for each, in their order.

        prompts: one or several of: a string, a list of token ids, {"prompt": text},
            {"prompt_token_ids": ids}.
        sampling_params: for all, or one for each prompt; default: get_default_sampling_params().
        lora_request: the adapter for all, or one for each prompt; None is the base model.
        return_errors: a request that fails has its `error` in its output, and the others are not
            disturbed. Otherwise the error is raised: of a request that can be seen to be wrong,
            before any runs; of one that fails later, when the others have finished.
        priority: for all, or one for each prompt; of an adapter's prompts the lowest are served
            first.
        """
        listed = _as_list(prompts)
        return self._complete(
            "prompts", listed, sampling_params, lora_request, use_tqdm, return_errors, priority
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        use_tqdm: bool = True,
        return_errors: bool = False,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several; see generate.

        messages: dicts with "role" and "content"; several conversations are a list of such lists.
        chat_template: instead of the model's or the adapter's own.
        add_generation_prompt: open an answer; without it the last message is the prompt's end.
        continue_final_message: go on with the last message, and open no answer.
        tools: functions that the template shows to the model, as in OpenAI's API.
        chat_template_kwargs: what else the template knows, such as enable_thinking.
        """
        self.get_tokenizer()
        is_one = bool(messages) and isinstance(messages[0], dict)
        conversations: Sequence[Any] = [messages] if is_one else messages
        lora_requests = _one_for_each("lora_request", lora_request, len(conversations))
        self._locate_all(lora_requests)
        options: dict[str, Any] = dict(chat_template_kwargs or {})
        if continue_final_message:
            options["continue_final_message"] = True
        if tools is not None:
            options["tools"] = list(tools)
        opens_answer = add_generation_prompt and not continue_final_message
        prompts = [
            self._conversation_prompt(conversation, lora, chat_template, opens_answer, options)
            for conversation, lora in zip(conversations, lora_requests, strict=True)
        ]
        return self._complete(
            "messages", prompts, sampling_params, lora_requests, use_tqdm, return_errors
        )

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[BeamSearchOutput]:
        """The likeliest sequences for each prompt, instead of drawn ones."""
        prompts = _as_list(prompts)
        loras = _one_for_each("lora_request", lora_request, len(prompts))
        self._locate_all(loras)
        first = SamplingParams(max_tokens=params.max_tokens)
        searches = [
            BeamSearch(self._process("", prompt, first, lora, 0)[0], params)
            for prompt, lora in zip(prompts, loras, strict=True)
        ]
        run_searches(searches, partial(self.generate, use_tqdm=False))
        return [
            search.output(self._tokenizer_of(search.request.lora_request)) for search in searches
        ]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        use_tqdm: bool = True,
        pooling: str = "last",
    ) -> list[EmbeddingRequestOutput]:
        """The prompts' embeddings, for each adapter its own; see SamplingParams.pooling."""
        params = SamplingParams(pooling=pooling, temperature=0, detokenize=False)
        return [
            EmbeddingRequestOutput(
                output.request_id,
                output.prompt,
                output.prompt_token_ids,
                EmbeddingOutput(output.embedding or []),
            )
            for output in self.generate(prompts, params, lora_request, use_tqdm)
        ]

    def stats(self) -> dict[str, Any]:
        """Page counts by state, numbers of requests, and counters since the start."""
        return self._core.stats()

    def adapters(self) -> list[dict[str, Any]]:
        """The state of each adapter that the engine knows."""
        with self._turn:
            return self._core.adapters()

    def preload_adapter(
        self, lora_request: LoRARequest, tier: Tier = "pool", pin: bool = False
    ) -> dict[str, Any]:
        """Bring an adapter into host memory, or into the pool; pin: it is never evicted from there.

        Gives its state. Raises ValueError if it can't be served or does not fit.
        """
        with self._turn:
            return self._loop.wait_for(self._core.preload_adapter(lora_request, tier, pin))

    def unpin_adapter(self, lora_request: LoRARequest) -> dict[str, Any]:
        """Let an adapter be evicted again. Raises ValueError if it is not pinned."""
        with self._turn:
            return self._core.unpin_adapter(lora_request)

    def refresh_adapter(self, lora_request: LoRARequest) -> dict[str, Any]:
        """Ask an adapter's source for its current version, which requests get from now on;
        `changed` says whether there is a new one. Raises ValueError if it can't be served."""
        with self._turn:
            state = self._loop.wait_for(self._core.refresh_adapter(lora_request))
            self._forget_place(lora_request)
            return state

    def unload_adapter(self, lora_request: LoRARequest, delete_files: bool = False) -> None:
        """Free all that an adapter takes; delete_files: also remove what was downloaded."""
        with self._turn:
            self._core.unload_adapter(lora_request, delete_files=delete_files)
            self._forget_place(lora_request)

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer. ValueError if skip_tokenizer_init left it out."""
        if self._tokenizer is None:
            raise ValueError("there is no tokenizer: skip_tokenizer_init=True left it out")
        return self._tokenizer

    def check_integrity(self) -> None:
        """Assert that every page has one owner and every count adds up."""
        with self._turn:
            self._core.check_integrity()

    def shutdown(self) -> None:
        """Give back memory and threads; the LLM is of no use afterwards. May be called twice."""
        with self._turn:
            loop, self._open_loop = self._open_loop, None
            if loop is not None:
                loop.core.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    @property
    def _loop(self) -> OfflineLoop:
        if self._open_loop is None:
            raise RuntimeError("this LLM was shut down: make another one")
        return self._open_loop

    @property
    def _core(self) -> EngineCore:
        return self._loop.core

    def _complete(
        self,
        name: str,
        prompts: Sequence[Prompt | ValueError],
        sampling_params: Any,
        lora_request: Any,
        use_tqdm: bool,
        return_errors: bool,
        priority: Any = 0,
    ) -> list[RequestOutput]:
        """What generate and chat do; name: that of their argument. A prompt that could not be made
        is the error with which its request fails."""
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = _one_for_each("sampling_params", sampling_params, len(prompts))
        lora_requests = _one_for_each("lora_request", lora_request, len(prompts))
        priorities = _one_for_each("priority", priority, len(prompts))
        request_ids = list(itertools.islice(self._request_ids, len(prompts)))
        self._locate_all(lora_requests)
        outputs: dict[str, RequestOutput] = {}
        processed: list[ProcessedPrompt] = []
        for index, request_id in enumerate(request_ids):
            prompt, lora, text = prompts[index], lora_requests[index], None
            try:
                if isinstance(prompt, ValueError):
                    raise prompt
                text = prompt_text(prompt)
                requests = self._process(request_id, prompt, params[index], lora, priorities[index])
                processed.append(ProcessedPrompt(text, requests, self._tokenizer_of(lora)))
            except ValueError as error:
                if len(prompts) > 1:
                    error.args = (f"{name}[{index}]: {error}",)
                if not return_errors:
                    raise
                outputs[request_id] = RequestOutput(
                    request_id, text, [], [], finished=True, lora_request=lora, error=error
                )
        with self._turn:
            finished = self._loop.run(processed, use_tqdm)
        outputs |= {output.request_id: output for output in finished}
        in_order = [outputs[request_id] for request_id in request_ids]
        for output in in_order:
            if output.error is not None and not return_errors:
                raise output.error
        return in_order

    def _locate_all(self, lora_requests: Sequence[Any]) -> None:
        """Have the files of adapters from elsewhere here, as far as they can be had: there may be
        tokenizers among them. Of those that can't, their requests will tell."""
        if self._tokenizers is None:
            return
        with self._turn:
            wanted = {lora for lora in lora_requests if isinstance(lora, LoRARequest)}
            missing = [lora for lora in wanted if not self._tokenizers.is_placed(lora)]
            located = {
                lora: self._core.locate_adapter(lora, self._tokenizers.known_version(lora))
                for lora in missing
            }
            for lora, operation in located.items():
                try:
                    self._tokenizers.learn(lora, **self._loop.wait_for(operation))
                except ValueError:
                    continue

    def _forget_place(self, lora_request: LoRARequest) -> None:
        if self._tokenizers is not None:
            self._tokenizers.forget(lora_request)

    def _conversation_prompt(
        self,
        conversation: Any,
        lora_request: LoRARequest | None,
        chat_template: str | None,
        opens_answer: bool,
        options: dict[str, Any],
    ) -> Prompt | ValueError:
        """The prompt, or what is wrong with the conversation."""
        try:
            tokenizer = self._tokenizer_of(lora_request)
            assert tokenizer is not None
            if chat_template is not None:
                tokenizer = tokenizer.with_chat_template(chat_template)
            messages = check_messages(conversation)
            token_ids = tokenizer.apply_chat_template(messages, opens_answer, **options)
        except ValueError as error:
            return error
        text = tokenizer.decode(token_ids, skip_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": token_ids}

    def _tokenizer_of(self, lora_request: LoRARequest | None) -> Tokenizer | None:
        """The adapter's, or the base model's, if there is one."""
        return None if self._tokenizers is None else self._tokenizers.find(lora_request)

    def _process(
        self, request_id: str, prompt: Prompt, params: Any, lora_request: Any, priority: Any
    ) -> list[EngineRequest]:
        if not isinstance(params, SamplingParams):
            raise ValueError(
                f"sampling_params={describe(params)} is not allowed: it must be SamplingParams"
            )
        if lora_request is not None and not isinstance(lora_request, LoRARequest):
            raise ValueError(
                f"lora_request={describe(lora_request)} is not allowed: it must be a LoRARequest, "
                "or None for the base model"
            )
        if not isinstance(priority, int):
            raise ValueError(f"priority={describe(priority)} is not allowed: it must be an integer")
        service = Service(priority=priority)
        return self._input_processor.process(
            request_id, prompt, params, lora_request, service, self._tokenizer_of(lora_request)
        )


def _as_list(prompts: Any) -> list[Any]:
    """The prompts, of which there may be one by itself."""
    if isinstance(prompts, str | bytes | dict) or not isinstance(prompts, Iterable):
        return [prompts]
    prompts = list(prompts)
    is_token_ids = bool(prompts) and isinstance(prompts[0], SupportsIndex)
    return [prompts] if is_token_ids else prompts


def _one_for_each(name: str, value: Any, num_prompts: int) -> Sequence[Any]:
    """The value repeated, or the values if there are as many as prompts."""
    if not isinstance(value, list | tuple):
        return [value] * num_prompts
    if len(value) != num_prompts:
        raise ValueError(
            f"{name} of length {len(value)} is not allowed: with {num_prompts} prompts it must be "
            f"one for all, or a list of length {num_prompts}"
        )
    return value
