"""Which adapter version a reference means now, for those who may have it. No torch.

A reference and a token are asked for once however many requests want them. The answer is
remembered: without a token until it is refreshed, with one for as long as an authorisation may be.
Nothing here waits: who has to wait for an answer is told by `deliver`.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field

from loraplex.engine.adapters.manager import Adapter, AdapterManager
from loraplex.engine.adapters.store import AdapterFiles, AdapterStore, Identity
from loraplex.engine.lora_request import LoRARequest

# Answers beyond this many are forgotten, those first that nobody has used for longest.
MAX_NUM_ANSWERS = 65_536


Outcome = Adapter | ValueError
Tell = Callable[[Outcome], None]


@dataclass(slots=True)
class _Answer:
    adapter: Adapter
    valid_until: float


@dataclass(slots=True, eq=False)
class _Question:
    """What a source is asked for, and who waits for the answer."""

    identity: Identity
    lora_request: LoRARequest
    waiting: dict[Hashable, Tell] = field(default_factory=dict)


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

        on_answer is called, by any thread, when `deliver` has something to tell.
        """
        self._store = store
        self._adapters = adapters
        self._authorization_seconds = authorization_seconds
        self._on_answer = on_answer
        self._clock = clock
        self._answers: OrderedDict[Identity, _Answer] = OrderedDict()
        self._questions: dict[Identity, _Question] = {}
        self._question_of: dict[Hashable, _Question] = {}
        self._arrived: deque[tuple[_Question, Future[AdapterFiles]]] = deque()

    def resolve(self, lora_request: LoRARequest, waiter: Hashable, tell: Tell) -> Adapter | None:
        """The adapter; None if it has to be asked for: then `deliver` will tell.

        Raises ValueError for a reference that is none.
        """
        identity = self._store.identify(lora_request)
        adapter = self.current(identity)
        if adapter is not None:
            self._answers.move_to_end(identity)
            return adapter
        question = self._questions.get(identity)
        if question is None:
            question = self._questions[identity] = _Question(identity, lora_request)
            self._ask(question)
        question.waiting[waiter] = tell
        self._question_of[waiter] = question
        return None

    def current(self, identity: Identity) -> Adapter | None:
        """The adapter that new requests get, if that is known."""
        answer = self._answers.get(identity)
        is_valid = answer is not None and self._clock() < answer.valid_until
        return answer.adapter if answer is not None and is_valid else None

    def leave(self, waiter: Hashable) -> None:
        """It waits no longer; its question goes on, as the answer may be of use."""
        del self._question_of.pop(waiter).waiting[waiter]

    def deliver(self) -> None:
        """Tell what has come since the last call to those who waited for it."""
        while self._arrived:
            question, fetched = self._arrived.popleft()
            outcome: Outcome
            try:
                files = fetched.result()
            except ValueError as error:
                outcome = error
            else:
                outcome = self._adapters.adopt(question.lora_request, files)
                if not question.waiting:
                    files.close()
            if self._questions.get(question.identity) is question:
                del self._questions[question.identity]
                if isinstance(outcome, Adapter):
                    self.replace(question.identity, outcome)
            for waiter, tell in question.waiting.items():
                del self._question_of[waiter]
                tell(outcome)
            if isinstance(outcome, Adapter):
                self._adapters.unload_unused(outcome)

    def replace(self, identity: Identity, adapter: Adapter) -> None:
        """New requests get this adapter from now on, whatever has been asked for before."""
        self._questions.pop(identity, None)
        old = self._answers.pop(identity, None)
        adapter.identities.add(identity)
        seconds = self._authorization_seconds if identity.has_token else math.inf
        self._answers[identity] = _Answer(adapter, self._clock() + seconds)
        if old is not None and old.adapter is not adapter:
            self._drop(identity, old.adapter)
        if len(self._answers) > MAX_NUM_ANSWERS:
            self._drop_oldest()

    def expire(self, identity: Identity) -> None:
        """All others that read the same, with whatever token, ask again."""
        for other, answer in self._answers.items():
            if other != identity and other.paths & identity.paths:
                answer.valid_until = -math.inf

    def forget(self, adapter: Adapter) -> None:
        """It can't be served: who asks next gets what the source has then."""
        for identity in adapter.identities:
            del self._answers[identity]
        adapter.identities.clear()
        self._adapters.unpin(adapter)

    def forget_all(self, identity: Identity) -> list[Adapter]:
        """Forget everything that reads the same, with whatever token. Gives the adapters, which are
        not unloaded yet."""
        adapters = []
        for other in [other for other in self._answers if other.paths & identity.paths]:
            adapter = self._answers.pop(other).adapter
            adapter.identities.discard(other)
            if not adapter.identities:
                self._adapters.unpin(adapter)
                adapters.append(adapter)
        return adapters

    def check_integrity(self) -> None:
        """Answers and adapters know each other."""
        for identity, answer in self._answers.items():
            assert identity in answer.adapter.identities
        assert len(self._answers) == sum(len(a.identities) for a in self._adapters)
        assert all(a.identities for a in self._adapters if a.pinned_tier), "pins can be undone"
        assert all(w in question.waiting for w, question in self._question_of.items())

    def _ask(self, question: _Question) -> None:
        def note(fetched: Future[AdapterFiles]) -> None:
            self._arrived.append((question, fetched))
            self._on_answer()

        self._store.fetch(question.lora_request).add_done_callback(note)

    def _drop_oldest(self) -> None:
        """Forget the answer that nobody has used for longest; what is pinned stays."""
        for identity, answer in self._answers.items():
            if answer.adapter.pinned_tier is None:
                del self._answers[identity]
                self._drop(identity, answer.adapter)
                return

    def _drop(self, identity: Identity, adapter: Adapter) -> None:
        adapter.identities.remove(identity)
        if not adapter.identities:
            self._adapters.unpin(adapter)
        self._adapters.unload_unused(adapter)
