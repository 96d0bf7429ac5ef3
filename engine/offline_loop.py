"""The loop of the offline API: steps a core until requests and operations are done."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from loraplex.engine.core import EngineCore
from loraplex.engine.errors import RequestError
from loraplex.engine.messages import EngineOutput, EngineRequest, refusal
from loraplex.engine.outputs import RequestOutput
from loraplex.engine.terminal import ProgressBar, interrupts_between_steps
from loraplex.engine.text.output_processor import OutputProcessor
from loraplex.engine.text.tokenizer import Tokenizer

WAIT_SECONDS = 0.1


class ProcessedPrompt(NamedTuple):
    """A user's request, ready for the core."""

    text: str | None
    requests: list[EngineRequest]
    tokenizer: Tokenizer | None


class OfflineLoop:
    """One thread at a time may use it."""

    def __init__(self, core: EngineCore, processor: OutputProcessor) -> None:
        self.core = core
        self._processor = processor

    def run(self, prompts: Sequence[ProcessedPrompt], use_tqdm: bool) -> list[RequestOutput]:
        """Run requests to their ends. Whatever ends it early, what has not finished is aborted."""
        core, processor = self.core, self._processor
        running: set[str] = set()
        finished: list[RequestOutput] = []
        bar = ProgressBar(total=len(prompts), unit=" requests", disable=not use_tqdm or not prompts)
        with bar, interrupts_between_steps() as check_interrupt:
            try:
                outputs: list[EngineOutput] = []
                for text, requests, tokenizer in prompts:
                    running.add(processor.add_request(text, requests, False, tokenizer))
                    outputs += self._submit(requests)
                while True:
                    processed = processor.process_outputs(outputs)
                    core.abort_requests(processed.aborts)
                    if processed.request_outputs:
                        running.difference_update(o.request_id for o in processed.request_outputs)
                        finished += processed.request_outputs
                        bar.add(processed.request_outputs)
                    if not core.has_unfinished_requests():
                        return finished
                    check_interrupt()
                    outputs = core.step()
                    if not outputs:
                        core.wait_for_work(WAIT_SECONDS)
            finally:
                for request_id in running:
                    core.abort_requests(processor.abort_request(request_id))

    def wait_for(self, operation: Future[dict[str, Any]]) -> dict[str, Any]:
        """Step until the core has done it. Raises what it ended with."""
        while not operation.done():
            self.core.step()
            self.core.wait_for_work(WAIT_SECONDS)
        return operation.result()

    def _submit(self, requests: list[EngineRequest]) -> list[EngineOutput]:
        """Hand requests to the core. Returns an output for each that it refuses."""
        refusals = []
        for request in requests:
            try:
                self.core.add_request(request)
            except RequestError as error:
                refusals.append(refusal(request, error))
        return refusals
