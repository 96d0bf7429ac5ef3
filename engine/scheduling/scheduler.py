"""Decides what each step computes: admission by memory, chunked prefill, preemption. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from loraplex.engine.adapters.lifecycle import AdapterLifecycle
from loraplex.engine.adapters.manager import Adapter, AdapterManager, Residency
from loraplex.engine.adapters.resolver import AdapterResolver
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import RequestError
from loraplex.engine.memory.kv_manager import KVManager
from loraplex.engine.memory.page_pool import PagePool
from loraplex.engine.messages import EngineOutput, FinishReason
from loraplex.engine.request import Request, RequestStatus
from loraplex.engine.scheduling.fitting import Fitting
from loraplex.engine.scheduling.waiting import WaitingRequests
from loraplex.engine.step import StepBatch, StepPlan, StepResult
from loraplex.engine.structured_outputs.grammar import dead_end
from loraplex.lora.spec import AdapterChanged


class Scheduler:
    """Owns all requests: those that wait, and running ones in order of admission."""

    def __init__(
        self,
        config: EngineConfig,
        pool: PagePool,
        kv: KVManager,
        adapters: AdapterManager,
        resolver: AdapterResolver,
        lifecycle: AdapterLifecycle,
        fitting: Fitting,
    ) -> None:
        self._max_num_seqs = config.max_num_seqs
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._adapter_affinity_tokens = config.adapter_affinity_tokens
        self._pool = pool
        self._kv = kv
        self._adapters = adapters
        self._resolver = resolver
        self._lifecycle = lifecycle
        self._fitting = fitting
        self._waiting = WaitingRequests(config, adapters, resolver)
        self._running: list[Request] = []
        self._stopped: list[Request] = []
        self._requests: dict[str, Request] = {}
        self._outputs: list[EngineOutput] = []
        self.num_preemptions = 0
        self.num_prefix_hit_tokens = 0
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0

    # -- requests in and out ---------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Raises RequestError if the request could never run, or not in time."""
        if request.request_id in self._requests:
            raise RequestError(f"request_id={request.request_id!r} is in use by another request")
        self._fitting.check(request, num_adapter_pages=0)
        self._waiting.add(request)
        self._requests[request.request_id] = request

    def abort(self, request_id: str) -> None:
        """End a request; unknown and finished ones are ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            self._take_out(request)
            self._finish(request, request.make_output(FinishReason.ABORT))

    def end_all_of(self, adapter: Adapter) -> None:
        """End all requests that have an adapter, which was unloaded."""
        name = adapter.lora_request.lora_name
        for request in [r for r in self._requests.values() if r.adapter is adapter]:
            self._take_out(request)
            self._finish_with_error(
                request, RequestError(f"the adapter {name!r} was unloaded", status=409)
            )

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests or self._outputs or self._lifecycle.is_busy)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """With those whose adapters are fetched and those whose grammars compile."""
        return len(self._waiting)

    @property
    def num_fetching(self) -> int:
        return self._waiting.num_fetching

    # -- one step --------------------------------------------------------------------------

    def schedule(self, only: Sequence[Request] | None = None) -> StepPlan:
        """Choose the tokens of the next step. Requests that don't run yet begin to only if they
        are among `only`, if that is given.

        There is no prefill phase and no decode phase: every request has num_tokens and
        num_computed_tokens, and each step moves the second towards the first. Chunked prefill,
        prefix hits, decoding and preemption by recompute are all this. A step may be planned
        before the tokens of the last one are known: that they are on their way is enough.
        """
        self._pool.clock += 1
        self._adapters.finish_copies()
        for request, error in self._waiting.advance():
            self._finish_with_error(request, error)
        is_memory_claimed = self._lifecycle.advance(self._requests.values())
        plan = StepPlan()
        budget = self._schedule_running(plan)
        if not is_memory_claimed:
            self._admit_waiting(plan, budget, only)
        plan.stopped, self._stopped = self._stopped, []
        for request, num_new_tokens in plan.num_new_tokens.items():
            request.num_computed_tokens += num_new_tokens
            if request.num_computed_tokens == request.num_tokens:
                request.num_tokens += 1  # the step samples the next one
        return plan

    def _schedule_running(self, plan: StepPlan) -> int:
        """Move running requests on; returns what is left of the token budget."""
        budget = self._max_num_batched_tokens
        # Decodes first: a long prompt must not hold up those who are already talking.
        is_decode = [r.num_tokens - r.num_computed_tokens == 1 for r in self._running]
        decodes = [r for r, d in zip(self._running, is_decode, strict=True) if d]
        prefills = [r for r, d in zip(self._running, is_decode, strict=True) if not d]
        for request in decodes + prefills:
            if request.status is not RequestStatus.RUNNING or budget == 0:
                continue
            if request.num_tokens == request.max_num_tokens:
                continue  # Its last token is on its way.
            num_new_tokens = request.num_tokens - request.num_computed_tokens
            if num_new_tokens > 1:
                num_new_tokens = request.chunk(request.num_computed_tokens, budget)
            while not self._kv.grow(request, request.num_computed_tokens + num_new_tokens):
                # The last admitted goes first, so that the oldest always gets on.
                victim = self._running[-1]
                budget += plan.num_new_tokens.pop(victim, 0)
                self._preempt(victim)
                if victim is request:
                    break
            else:
                plan.num_new_tokens[request] = num_new_tokens
                budget -= num_new_tokens
        return budget

    def _admit_waiting(self, plan: StepPlan, budget: int, only: Sequence[Request] | None) -> None:
        if budget == 0 or len(self._running) >= self._max_num_seqs:
            return
        candidates: Iterable[Request] = self._waiting.queue.candidates(self._handicap)
        if only is not None:
            candidates = [r for r in only if r.status is RequestStatus.WAITING]
        for request in candidates:
            try:
                is_ready = self._bring_adapter(request)
                if is_ready:
                    request.meet_adapter()
            except ValueError as error:
                self._waiting.remove(request)
                self._adapter_failed(request, error)
                continue
            if is_ready is None:
                continue
            num_new_tokens = self._admit(request, budget) if is_ready else 0
            if num_new_tokens == 0:
                # Memory lacks. Letting others pass would keep taking what this one waits for.
                return
            plan.num_new_tokens[request] = num_new_tokens
            budget -= num_new_tokens
            if budget == 0 or len(self._running) >= self._max_num_seqs:
                return

    def _handicap(self, request: Request) -> int:
        """Bounded preference for adapters that need no load, and for the base model."""
        adapter = request.adapter
        if adapter is None or adapter.residency is Residency.RESIDENT:
            return 0
        return self._adapter_affinity_tokens

    def _bring_adapter(self, request: Request) -> bool | None:
        """True: its adapter is there. None: it is on its way. False: no memory for it yet.

        Raises ValueError if the adapter cannot be served to this request.
        """
        adapter = request.adapter
        if adapter is None or adapter.residency is Residency.RESIDENT:
            return True
        if adapter.residency is Residency.COPYING:
            return None
        try:
            num_pages = self._adapters.num_pages(adapter)
        except ValueError:
            self._resolver.forget(adapter)
            self._adapters.tally[request.adapter_name].failures += 1
            raise
        if num_pages is None:
            return None
        self._fitting.check(request, num_pages)
        return self._adapters.start_copy(adapter, num_pages)

    def _adapter_failed(self, request: Request, error: ValueError) -> None:
        """A request whose adapter cannot be had ends, unless the adapter's next version will do:
        the one that it wants is gone, and has computed none of its output."""
        try:
            if not isinstance(error, AdapterChanged) or request.num_preemptions > 0:
                raise error
            self._waiting.ask_again(request)
        except ValueError as refusal:
            self._finish_with_error(request, refusal)

    def _admit(self, request: Request, budget: int) -> int:
        """Start or resume a request; returns its tokens for this step, 0 if memory lacks."""
        if request.num_pending_tokens:
            return 0  # Just preempted for lack of memory, while a step samples its next token.
        prefix = self._kv.find_prefix(request)
        num_computed_tokens = len(prefix) * self._kv.block_size
        num_new_tokens = request.chunk(num_computed_tokens, budget)
        num_pages = self._kv.num_pages_needed(prefix, num_computed_tokens + num_new_tokens)
        adapter = request.adapter
        if adapter is not None and not adapter.is_in_use:
            num_pages += len(adapter.pages)  # Idle pages count as available, but are taken now.
        # A page for each running request to grow by, lest one admitted now is preempted at once.
        if num_pages + len(self._running) > self._pool.num_available:
            return 0
        if adapter is not None:
            self._adapters.acquire(adapter)
        self._kv.take_prefix(request, prefix)
        has_grown = self._kv.grow(request, num_computed_tokens + num_new_tokens)
        assert has_grown
        self._waiting.remove(request)
        self._running.append(request)
        request.status = RequestStatus.RUNNING
        if request.num_preemptions == 0:
            request.note_first_turn()
            request.num_cached_tokens = num_computed_tokens
            self.num_prefix_hit_tokens += num_computed_tokens
            self.num_prompt_tokens += request.num_prompt_tokens
            self._waiting.queue.charge(request, request.num_prompt_tokens, 0)
        return num_new_tokens

    def _preempt(self, request: Request) -> None:
        """Give its memory to others; it starts over from the prefix cache later."""
        self._take_out(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.push_back(request)

    def _take_out(self, request: Request) -> None:
        """Off the queue it is in, and off what it holds."""
        if request.status is not RequestStatus.RUNNING:
            self._waiting.remove(request)
            return
        self._running.remove(request)
        self._stopped.append(request)
        self._kv.release(request)
        if request.adapter is not None:
            self._adapters.release(request.adapter)

    # -- after a failed step ---------------------------------------------------------------

    def roll_back(self, requests: Iterable[Request]) -> None:
        """Undo the steps in flight, which had these requests: all running ones wait again, to be
        computed from their known tokens, and no block of the prefix cache is of such a step."""
        for request in self._running[::-1]:
            self._preempt(request)
        for request in requests:
            request.forget_pending()
        self._kv.forget_prefixes()

    def refuse(self, request: Request, error: Exception) -> None:
        """End a request that makes steps fail with this error, if it is not finished."""
        if request.status is not RequestStatus.FINISHED:
            self._take_out(request)
            message = f"the request makes the engine fail, alone: {type(error).__name__}: {error}"
            self._finish_with_error(request, RequestError(message, status=500))

    # -- after the step --------------------------------------------------------------------

    def update(self, batch: StepBatch, result: StepResult) -> None:
        """Take the step's tokens in. Later steps may be in flight, and requests may have stopped
        since this one was launched: a token is dropped if its request is finished, and kept if it
        was preempted."""
        for request in batch.requests:
            self._kv.key_computed_blocks(request)
        batch.give_prompt_results(result)
        num_outputs = len(self._outputs)
        logprobs_of = result.logprobs or [None] * len(result.token_ids)
        for index, token_id, token_logprobs in zip(
            batch.sampled.tolist(), result.token_ids, logprobs_of, strict=True
        ):
            request = batch.requests[index]
            if request.status is RequestStatus.FINISHED:
                continue
            if request.grammar is not None and not request.grammar.accept(token_id):
                self._take_out(request)
                self._finish_with_error(request, dead_end(request))
                continue
            request.all_token_ids.append(token_id)
            self._waiting.queue.charge(request, 0, 1)
            finish_reason, stop_reason = request.finish_reason_at(token_id)
            output = request.make_output(finish_reason)
            output.new_token_ids.append(token_id)
            output.stop_reason = stop_reason
            output.logprobs = None if token_logprobs is None else [token_logprobs]
            self._outputs.append(output)
            if finish_reason is not None:
                self._take_out(request)
                self._forget(request)
        self.num_output_tokens += len(self._outputs) - num_outputs

    def take_outputs(self) -> list[EngineOutput]:
        """What there is to tell since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def _finish(self, request: Request, output: EngineOutput) -> None:
        self._outputs.append(output)
        self._forget(request)

    def _finish_with_error(self, request: Request, error: ValueError) -> None:
        self._finish(request, request.make_error_output(error))

    def _forget(self, request: Request) -> None:
        self._waiting.leave(request)
        request.status = RequestStatus.FINISHED
        del self._requests[request.request_id]

    def check_integrity(self, in_flight: Sequence[StepBatch]) -> None:
        """Requests, blocks, adapters, pages and the steps in flight agree; also every page has one
        owner."""
        self._pool.check_integrity()
        self._kv.check_integrity(self._running)
        self._waiting.check_integrity()
        requests = [*self._waiting, *self._running]
        self._adapters.check_integrity(requests)
        assert len(requests) == len(self._requests)
        assert {r.request_id for r in requests} == self._requests.keys()
        assert all(r.status is RequestStatus.RUNNING for r in self._running)
        num_pending = Counter(b.requests[i] for b in in_flight for i in b.sampled.tolist())
        assert all(r.num_pending_tokens == num_pending[r] for r in requests)
