"""The engine for asyncio programs: requests of many tasks, one engine process behind them.

Knows text (through the input and output processors) and streams; HTTP is the server's.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from loraplex.engine.adapters.store import Tier
from loraplex.engine.beam_search import BeamSearch, BeamSearchParams
from loraplex.engine.config import EngineConfig
from loraplex.engine.core_client import CoreClient, EngineDeadError
from loraplex.engine.errors import RequestError
from loraplex.engine.latest_output import LatestOutput
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import EngineRequest, ModelInfo, Service
from loraplex.engine.outputs import RequestOutput
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.text.adapter_tokenizers import AdapterTokenizers
from loraplex.engine.text.input_processor import InputProcessor, Prompt, prompt_text
from loraplex.engine.text.output_processor import OutputProcessor

if TYPE_CHECKING:
    from loraplex.engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

CORE_FACTORY = "loraplex.engine.core:EngineCore"
# How long, in seconds, an engine process that was asked to end may take before it is killed.
SHUTDOWN_WAIT = 10.0
# A longer text is tokenised in a thread: it would hold up everybody's streams.
MAX_CHARS_ON_THE_LOOP = 16 * 1024

T = TypeVar("T")


async def call_for_text(function: Callable[[], T], num_characters: int) -> T:
    """The result of a function that tokenises so much text: in a thread, if it is much."""
    if num_characters > MAX_CHARS_ON_THE_LOOP:
        return await asyncio.to_thread(function)
    return function()


class AsyncEngine:
    """Generates for many callers at once. `start` it first, `shutdown` it at the end.

    core_factory names the callable that makes the core, in the engine process, of the config.
    tokenizer defaults to the model's; skip_tokenizer_init leaves it out.
    """

    model_info: ModelInfo
    _client: CoreClient

    def __init__(
        self,
        config: EngineConfig,
        core_factory: str = CORE_FACTORY,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self._core_factory = core_factory
        self._streams: dict[str, LatestOutput] = {}
        self._locating: dict[LoRARequest, asyncio.Future[dict[str, Any]]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._error: EngineDeadError | None = EngineDeadError("the engine is not started")
        self._died = asyncio.Event()

    async def start(self) -> None:
        """Start the engine process and load the model; again, if it has died.

        Raises ValueError for a setting that is not allowed, EngineDeadError if the start fails.
        """
        if self._reader is not None:
            await self._reader
            self._reader = None
            await self._client.shutdown(patience=0)
        self._client = CoreClient(self.config, self._core_factory)
        try:
            self.model_info = await self._client.start()
            if self.tokenizer is None and not self.config.skip_tokenizer_init:
                self.tokenizer = await asyncio.to_thread(self._load_tokenizer)
        except BaseException:
            # Whoever gives up during a load of minutes does not want to wait for its end.
            await self._client.shutdown(patience=0)
            raise
        if self.tokenizer is not None:
            self._tokenizers = AdapterTokenizers(self.tokenizer, self.model_info.tokenizer_path)
        self._input_processor = InputProcessor(self.model_info, self.tokenizer, self.config.seed)
        self._output_processor = OutputProcessor(self.tokenizer)
        self._error = None
        self._died.clear()
        self._reader = asyncio.create_task(self._read_outputs(), name="loraplex-outputs")

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str | None = None,
        lora_request: LoRARequest | None = None,
        service: Service | None = None,
        stream: bool = True,
        timeout: float | None = None,
        fetch_seconds: float = 0.0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The output so far whenever there is more of it, the last one with `finished`.

        A caller that is slow misses states in between, never text. stream=False gives the last one
        only. Closing the iterator, or cancelling its task, ends the request, and so do `timeout`
        seconds, with a RequestError. fetch_seconds: how long tokenizer_of has taken before.
        Raises ValueError for a request that is not allowed, RequestError for one that the engine
        refuses or fails, EngineDeadError.
        """
        await self.check_health()
        request_id = request_id or uuid.uuid4().hex
        started = time.monotonic()
        tokenizer = await self.tokenizer_of(lora_request)
        fetch_seconds += time.monotonic() - started
        requests = await self._process_input(
            request_id, prompt, sampling_params, lora_request, service, tokenizer
        )
        for request in requests:
            request.fetch_seconds = fetch_seconds
            request.arrival_time -= fetch_seconds
        outputs = self._open(request_id, prompt_text(prompt), requests, stream, tokenizer)
        timer = None
        if timeout is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(timeout, outputs.fail, _late(timeout))
        try:
            self._client.add_requests(requests)
            while True:
                output = await outputs.get()
                if output.error is not None:
                    raise output.error
                yield output
                if output.finished:
                    return
        finally:
            if timer is not None:
                timer.cancel()
            self._close(request_id)

    async def beam_search(
        self,
        prompt: Prompt,
        params: BeamSearchParams,
        lora_request: LoRARequest | None = None,
        service: Service | None = None,
        timeout: float | None = None,
        fetch_seconds: float = 0.0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """One output, of the likeliest sequences; else as generate."""
        tokenizer = await self.tokenizer_of(lora_request)
        first = SamplingParams(max_tokens=params.max_tokens)
        (request,) = await self._process_input("", prompt, first, lora_request, service, tokenizer)
        search = BeamSearch(request, params)

        async def extend(beam: Prompt) -> RequestOutput:
            outputs = self.generate(
                beam, search.step_params, None, lora_request, service, False,
                fetch_seconds=fetch_seconds,
            )  # fmt: skip
            return [output async for output in outputs][-1]

        try:
            async with asyncio.timeout(timeout):
                (beginning,) = outputs = [await extend(beam) for beam in search.prompts()]
                search.extend(outputs)
                while not search.is_done:
                    search.extend(await asyncio.gather(*map(extend, search.prompts())))
        except TimeoutError:
            raise _late(timeout) from None
        yield search.request_output(tokenizer, beginning)

    async def tokenizer_of(self, lora_request: LoRARequest | None) -> Tokenizer | None:
        """The adapter's tokenizer, or the base model's; None where the engine runs without.

        An adapter from elsewhere is fetched for it; nobody else waits. Raises ValueError for files
        that can't be read, RequestError for an adapter that can't be had, EngineDeadError.
        """
        if self.tokenizer is None:
            return None
        if lora_request is not None and not self._tokenizers.is_placed(lora_request):
            await self._locate(lora_request)
        find = partial(self._tokenizers.find, lora_request)
        if self._tokenizers.is_at_hand(lora_request):
            return find()
        return await asyncio.to_thread(find)

    async def _locate(self, lora_request: LoRARequest) -> None:
        """Learn where the core has the adapter's files. It is asked once, however many wait."""
        locating = self._locating.get(lora_request)
        if locating is None:
            known = self._tokenizers.known_version(lora_request)
            locating = asyncio.ensure_future(
                self._manage("locate_adapter", lora_request, known_version=known)
            )
            self._locating[lora_request] = locating

            def forget(done: asyncio.Future[dict[str, Any]]) -> None:
                del self._locating[lora_request]
                done.cancelled() or done.exception()  # All who waited for it may have left.

            locating.add_done_callback(forget)
        # Who asked first may leave before the others.
        self._tokenizers.learn(lora_request, **await asyncio.shield(locating))

    async def abort(self, request_id: str) -> None:
        """End a request early: its iterator gives what there is, with finish_reason "abort"."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self._client.abort_requests(stream.engine_request_ids)

    async def stats(self) -> dict[str, Any]:
        """Page counts by state, and counters, as the core has them. Raises EngineDeadError."""
        await self.check_health()
        return await self._client.call("stats")

    async def adapters(self) -> list[dict[str, Any]]:
        """The state of each adapter that the engine knows. Raises EngineDeadError."""
        await self.check_health()
        return await self._client.call("adapters")

    async def preload_adapter(
        self, lora_request: LoRARequest, tier: Tier = "pool", pin: bool = False
    ) -> dict[str, Any]:
        """Bring an adapter into host memory, or into the pool; pin: it is never evicted from there.

        Gives its state. Raises RequestError, EngineDeadError, as all that follow.
        """
        return await self._manage("preload_adapter", lora_request, tier=tier, pin=pin)

    async def unpin_adapter(self, lora_request: LoRARequest) -> dict[str, Any]:
        """Let an adapter be evicted again."""
        return await self._manage("unpin_adapter", lora_request)

    async def refresh_adapter(self, lora_request: LoRARequest) -> dict[str, Any]:
        """Ask an adapter's source for its current version: new requests get that, and those that
        run go on with theirs. `changed` says whether there is a new one."""
        state = await self._manage("refresh_adapter", lora_request)
        self._forget_place(lora_request)
        return state

    async def unload_adapter(
        self, lora_request: LoRARequest, abort: bool = False, delete_files: bool = False
    ) -> dict[str, Any]:
        """Free all that an adapter takes, when the last of `num_requests` that have it has ended;
        abort: end them now. delete_files: also remove what was downloaded."""
        state = await self._manage(
            "unload_adapter", lora_request, abort=abort, delete_files=delete_files
        )
        self._forget_place(lora_request)
        return state

    def _forget_place(self, lora_request: LoRARequest) -> None:
        if self.tokenizer is not None:
            self._tokenizers.forget(lora_request)

    async def _manage(self, method: str, lora_request: LoRARequest, **options: Any) -> Any:
        await self.check_health()
        return await self._client.call(method, lora_request, **options)

    async def check_health(self) -> None:
        """Raises EngineDeadError if the engine can't serve."""
        if self._error is not None:
            raise EngineDeadError(str(self._error))

    async def wait_until_dead(self) -> None:
        """Until the engine process has ended, or can't be understood, unasked."""
        await self._died.wait()

    @property
    def errored(self) -> bool:
        """Whether the engine can't serve: it died, was shut down, or never started."""
        return self._error is not None

    @property
    def num_open_requests(self) -> int:
        return len(self._streams)

    async def shutdown(self) -> None:
        """End the engine process; open requests fail. May be called twice, and unstarted."""
        self._die(EngineDeadError("the engine was shut down"))
        reader, self._reader = self._reader, None
        if reader is None:
            return
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await self._client.shutdown(SHUTDOWN_WAIT)

    def _load_tokenizer(self) -> Tokenizer:
        # Imported late: it brings transformers, which takes seconds.
        from loraplex.engine.text.tokenizer import load_tokenizer

        return load_tokenizer(self.model_info.tokenizer_path)

    async def _process_input(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams,
        lora_request: LoRARequest | None,
        service: Service | None,
        tokenizer: Tokenizer | None,
    ) -> list[EngineRequest]:
        process = partial(
            self._input_processor.process,
            request_id,
            prompt,
            sampling_params,
            lora_request=lora_request,
            service=service,
            tokenizer=tokenizer,
        )
        num_characters = sum(map(len, sampling_params.bad_words))
        if isinstance(prompt, str):
            num_characters += len(prompt)
        return await call_for_text(process, num_characters)

    def _open(
        self,
        request_id: str,
        prompt: str | None,
        requests: list[EngineRequest],
        stream: bool,
        tokenizer: Tokenizer | None,
    ) -> LatestOutput:
        if request_id in self._streams:
            raise ValueError(f"request_id={request_id!r} is not allowed: it is in use")
        self._output_processor.add_request(prompt, requests, stream, tokenizer)
        outputs = self._streams[request_id] = LatestOutput([r.request_id for r in requests])
        return outputs

    def _close(self, request_id: str) -> None:
        """Forget a request, and end it in the core if it still runs there."""
        stream = self._streams.pop(request_id)
        if stream.is_finished:
            return
        engine_request_ids = self._output_processor.abort_request(request_id)
        if self._error is None and engine_request_ids:
            self._client.abort_requests(engine_request_ids)

    async def _read_outputs(self) -> None:
        try:
            while True:
                self._pass_on(await self._client.receive_outputs())
                # Where the core is quicker than we are, the streams still get their turn.
                await asyncio.sleep(0)
        except EngineDeadError as error:
            logger.error("%s", error)
            self._die(error)
            self._died.set()
        except Exception as error:
            logger.exception("Outputs of the engine can't be read.")
            self._die(EngineDeadError(f"the engine's front failed: {error!r}"))
            self._died.set()

    def _pass_on(self, outputs: list[Any]) -> None:
        processed = self._output_processor.process_outputs(outputs)
        if processed.aborts:
            self._client.abort_requests(processed.aborts)
        for output in processed.request_outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put(output)

    def _die(self, error: EngineDeadError) -> None:
        self._error = self._error or error
        for stream in self._streams.values():
            stream.fail(error)


def _late(timeout: float | None) -> RequestError:
    """What a request of so many seconds ends with."""
    return RequestError(f"the request was not finished within {timeout:g} seconds", status=504)
