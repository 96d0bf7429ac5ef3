"""Which adapter version a reference means now, for those who may have it. No torch.

A reference and a token are asked for once however many requests want them. The answer is
remembered: without a token until it is refreshed, with one for as long as an authorisation may be.
Nothing here waits: a request whose answer is not known yet gets it from `take_answers`.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from loraplex.engine.adapter_manager import (
    Adapter,
    AdapterFiles,
    AdapterManager,
    AdapterStore,
    Identity,
)
from loraplex.engine.request import LoRARequest, Request

# Answers beyond this many are forgotten, those first that nobody has used for longest.
MAX_NUM_ANSWERS = 65_536


@dataclass(slots=True)
class _Answer:
    adapter: Adapter
    valid_until: float


@dataclass(slots=True, eq=False)
class Question:
    """A reference that a source is asked for, and the requests that wait for the answer."""

    identity: Identity
    lora_request: LoRARequest
    waiting: dict[Request, None] = field(default_factory=dict)


class AdapterResolver:
    """Finds the adapters of requests. One thread calls it."""

    def __init__(
        self,
        store: AdapterStore,
        adapters: AdapterManager,
        authorization_seconds: float,
        on_answer: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """authorization_seconds: how long it is remembered that a token may read an adapter.

        on_answer is called, by any thread, when `take_answers` has something to give.
        """
        self._store = store
        self._adapters = adapters
        self._authorization_seconds = authorization_seconds
        self._on_answer = on_answer
        self._clock = clock
        self._answers: OrderedDict[Identity, _Answer] = OrderedDict()
        self._questions: dict[Identity, Question] = {}
        self._arrived: deque[tuple[Question, Future[AdapterFiles]]] = deque()

    def resolve(self, request: Request) -> Adapter | None:
        """The adapter of a request; None if it has to wait for it.

        Raises ValueError for a reference that is none.
        """
        lora_request = request.wire.lora_request
        assert lora_request is not None
        identity = self._store.identify(lora_request)
        answer = self._answers.get(identity)
        if answer is not None and self._clock() < answer.valid_until:
            self._answers.move_to_end(identity)
            return answer.adapter
        question = self._questions.get(identity)
        if question is None:
            question = self._questions[identity] = Question(identity, lora_request)
            self._ask(question)
        question.waiting[request] = None
        request.question = question
        return None

    def leave(self, request: Request) -> None:
        """A request waits no longer; its question goes on, as its answer may be of use."""
        assert request.question is not None
        del request.question.waiting[request]
        request.question = None

    def take_answers(self) -> Iterator[tuple[Request, Adapter | ValueError]]:
        """What has come since the last call, for each request that waited for it."""
        while self._arrived:
            question, fetched = self._arrived.popleft()
            del self._questions[question.identity]
            outcome: Adapter | ValueError
            try:
                outcome = self._accept(question, fetched.result())
            except ValueError as error:
                outcome = error
            for request in question.waiting:
                request.question = None
                yield request, outcome

    def forget(self, adapter: Adapter) -> None:
        """It can't be served: who asks next gets what the source has then."""
        for identity in adapter.identities:
            del self._answers[identity]
        adapter.identities.clear()

    def check_integrity(self) -> None:
        """Answers and adapters know each other."""
        for identity, answer in self._answers.items():
            assert identity in answer.adapter.identities
        assert len(self._answers) == sum(len(a.identities) for a in self._adapters)

    def _ask(self, question: Question) -> None:
        def note(fetched: Future[AdapterFiles]) -> None:
            self._arrived.append((question, fetched))
            self._on_answer()

        self._store.fetch(question.lora_request).add_done_callback(note)

    def _accept(self, question: Question, files: AdapterFiles) -> Adapter:
        identity = question.identity
        adapter = self._adapters.adopt(question.lora_request, files)
        if not question.waiting:
            files.close()
        self._drop_answer(identity, unless_of=adapter)
        adapter.identities.add(identity)
        seconds = self._authorization_seconds if identity.has_token else math.inf
        self._answers[identity] = _Answer(adapter, self._clock() + seconds)
        if len(self._answers) > MAX_NUM_ANSWERS:
            self._drop_answer(next(iter(self._answers)))
        return adapter

    def _drop_answer(self, identity: Identity, unless_of: Adapter | None = None) -> None:
        answer = self._answers.pop(identity, None)
        if answer is not None and answer.adapter is not unless_of:
            answer.adapter.identities.remove(identity)
            self._adapters.unload_unused(answer.adapter)
