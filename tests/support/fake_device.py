"""A device half without a model: it remembers what was written to every KV slot and adapter page,
and its next token is a hash of what it reads back. Whoever mixes up blocks, adapters or positions
gets other tokens than `expected_tokens`.

Like a GPU, it does its work in order and late: a launched step is computed when its result, or
that of a later step, is waited for."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loraplex.engine.adapters.store import Identity
from loraplex.engine.config import EngineConfig
from loraplex.engine.core import EngineCore
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import EngineOutput, EngineRequest, ModelInfo, Service, TokenLogprobs
from loraplex.engine.runner.sampling_state import (
    LogitAdjustments,
    TokensOfRows,
    generator_state,
    uniform,
)
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.step import PoolingSpan, PromptLogprobsSpan, StepBatch, StepResult
from loraplex.lora.spec import AdapterChanged, AdapterError, AdapterTraits

VOCAB_SIZE = 1000
EOS_TOKEN_ID = VOCAB_SIZE - 1
# Of adapters whose names begin with "activated".
INVOCATION_TOKEN_IDS = (7, 8)


def next_token(
    adapter: str,
    token_ids: Sequence[int],
    random_number: float | None = None,
    forbidden: Collection[int] = (),
) -> int:
    text = f"{adapter}:{','.join(map(str, token_ids))}:{random_number}"
    token_id = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) % EOS_TOKEN_ID
    while token_id in forbidden:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


def traits_of(adapter: str) -> AdapterTraits:
    invocation = INVOCATION_TOKEN_IDS if adapter.startswith("activated") else ()
    return AdapterTraits(max_rank=8, module_mask=1, invocation_token_ids=invocation)


def expected_tokens(request: EngineRequest) -> list[int]:
    """The output of a request that is run alone, by the definition of the fake model."""
    adapter = request.lora_request.lora_name if request.lora_request else ""
    if traits_of(adapter).first_token(request.prompt_token_ids) is None:
        adapter = ""
    params, output = request.sampling_params, list[int]()
    while len(output) < request.max_tokens:
        random_number = None
        if not params.is_greedy:
            position = np.array([len(output)], np.int32)
            random_number = float(uniform(generator_state(request.seed), position)[0])
        forbidden = request.eos_token_ids if len(output) < params.min_tokens else []
        token_ids = request.prompt_token_ids + output
        output.append(next_token(adapter, token_ids, random_number, forbidden))
        if output[-1] in request.eos_token_ids and len(output) >= params.min_tokens:
            break
    return output


@dataclass
class FakeFiles:
    """A version of a path: how often `FakeStore.change` was called for it."""

    path: str
    version: int
    is_closed: bool = False
    num_downloads: int = 1

    @property
    def key(self) -> bytes:
        return f"{self.path}@{self.version}".encode()

    def close(self) -> None:
        self.is_closed = True


class FakeStore:
    """An adapter of path "name:pages=N" has N pages; "fail" fails. Loads take `num_polls` polls.
    Copies that steps wait for are made at once, others in `finish_copies`; those that wait for
    steps, after them. Fetches end at once, or in `finish_fetches` where `holds_fetches`. A version
    above 0 computes what an adapter of the name "name@version" would."""

    def __init__(self, num_polls: int = 2) -> None:
        self.finish_steps: Callable[[], None] = lambda: None
        self.page_contents: dict[int, tuple[str, int]] = {}
        self.holds_fetches = False
        self.fetches: list[tuple[LoRARequest, Future[FakeFiles]]] = []
        self.versions: Counter[str] = Counter()
        self.files: list[FakeFiles] = []
        self.located: list[FakeFiles] = []
        self.images: set[bytes] = set()
        self.pinned: set[bytes] = set()
        self.broken: set[bytes] = set()
        self.max_num_pinned = 2
        self.deleted: list[bytes] = []
        self.polls: dict[bytes, int] = {}
        self.copies: list[tuple[Future[None], Callable[[], None]]] = []
        self.num_polls = num_polls

    def identify(self, lora_request: LoRARequest) -> Identity:
        path = lora_request.lora_path
        if path.startswith("!"):
            raise ValueError(f"lora_path={path!r} is not allowed")
        return Identity(((path, lora_request.token),), None)

    def fetch(self, lora_request: LoRARequest, refresh: bool = False) -> Future[FakeFiles]:
        future: Future[FakeFiles] = Future()
        self.fetches.append((lora_request, future))
        if not self.holds_fetches:
            self.finish_fetches()
        return future

    def finish_fetches(self, error: ValueError | None = None) -> None:
        fetches, self.fetches = self.fetches, []
        for lora_request, future in fetches:
            if error is not None:
                future.set_exception(error)
                continue
            path = lora_request.lora_path
            self.files.append(FakeFiles(path, self.versions[path]))
            future.set_result(self.files[-1])

    def change(self, path: str) -> None:
        """The path has another version from now on."""
        self.versions[path] += 1

    def locate(self, files: FakeFiles) -> Future[str]:
        located: Future[str] = Future()
        self.located.append(files)
        located.set_result("/nowhere")
        return located

    def num_pages(self, files: FakeFiles) -> int | None:
        files.close()
        version, path = files.key, files.path
        self.polls[version] = self.polls.get(version, 0) + 1
        if self.polls[version] <= self.num_polls:
            return None
        if "fail" in path:
            raise ValueError(f"adapter {path} can't be served")
        if version in self.broken:
            raise AdapterError(f"adapter {path} is broken")
        if version not in self.images and files.version != self.versions[path]:
            raise AdapterChanged(f"adapter {path} has changed")
        self.images.add(version)
        return int(path.split("=")[1])

    def pin(self, version: bytes) -> None:
        assert version in self.images
        if len(self.pinned) == self.max_num_pinned:
            raise AdapterError("no room to pin", status=409)
        self.pinned.add(version)

    def unpin(self, version: bytes) -> None:
        self.pinned.discard(version)

    def holds(self, version: bytes) -> bool:
        return version in self.images

    def read_interval(self, version: bytes) -> tuple[float, float]:
        return 0.0, 0.0

    def stats(self) -> dict[str, Any]:
        return {}

    def delete(self, files: FakeFiles) -> None:
        self.deleted.append(files.key)

    def drop(self, version: bytes) -> None:
        assert version not in self.pinned
        self.images.discard(version)
        self.polls.pop(version, None)

    def traits(self, version: bytes) -> AdapterTraits:
        return traits_of(version.decode())

    def copy_to_pages(
        self, version: bytes, pages: list[int], after_steps: bool, before_steps: bool
    ) -> Future[None]:
        future: Future[None] = Future()
        path, _, number = version.decode().rpartition("@")
        name = path.split(":")[0] + (f"@{number}" if number != "0" else "")

        def copy() -> None:
            if after_steps:
                self.finish_steps()
            self.page_contents.update((page, (name, i)) for i, page in enumerate(pages))

        if before_steps:
            copy()
        self.copies.append((future, (lambda: None) if before_steps else copy))
        return future

    def finish_copies(self) -> None:
        for future, copy in self.copies:
            copy()
            future.set_result(None)
        self.copies.clear()


class FakeStep:
    """A launched step: computed when it must be, its result asked for once."""

    def __init__(self, runner: FakeRunner, batch: StepBatch) -> None:
        self.runner = runner
        self.batch = batch
        self.computed: StepResult | None = None

    def result(self) -> StepResult:
        while self.computed is None:
            self.runner.compute_oldest()
        assert self.runner.in_flight.popleft() is self, "results are taken in order"
        return self.computed


class FakeRunner:
    def __init__(self, store: FakeStore, block_size: int, steps_ahead: int) -> None:
        self.store = store
        store.finish_steps = self.compute_all
        self.block_size = block_size
        self.steps_ahead = steps_ahead
        self.slots: dict[int, tuple[str, int, int]] = {}
        self.last_token: dict[int, int] = {}
        self.batches: list[int] = []
        self.waiting: deque[FakeStep] = deque()
        """Launched and not computed."""
        self.in_flight: deque[FakeStep] = deque()
        """Launched, and the result not taken."""

    def launch(self, batch: StepBatch) -> FakeStep:
        self.batches.append(len(batch.token_ids))
        assert len(self.in_flight) <= self.steps_ahead
        step = FakeStep(self, batch)
        self.waiting.append(step)
        self.in_flight.append(step)
        return step

    def compute_oldest(self) -> None:
        step = self.waiting.popleft()
        step.computed = self._compute(step.batch)

    def compute_all(self) -> None:
        while self.waiting:
            self.compute_oldest()

    def _compute(self, batch: StepBatch) -> StepResult:
        adapters = self._adapter_of_rows(batch)
        token_ids = [
            token_id if slot < 0 else self.last_token[slot]
            for token_id, slot in zip(
                batch.token_ids.tolist(), batch.token_slots.tolist(), strict=True
            )
        ]
        for row, slot in enumerate(batch.slot_mapping.tolist()):
            assert slot >= self.block_size, "nobody writes to the scratch page"
            self.store.page_contents.pop(slot // self.block_size, None)
            self.slots[slot] = adapters[row], int(batch.positions[row]), token_ids[row]
        tokens = [self._sample(batch, i, adapters) for i in range(len(batch.sampled))]
        self.last_token.update(zip(batch.sampled_slots.tolist(), tokens, strict=True))
        wanted = batch.sampling.num_logprobs.tolist()
        logprobs = [_logprobs(t, n) for t, n in zip(tokens, wanted, strict=True)]
        scores = [self._score(span) for span in batch.prompt_logprobs]
        pooled = [self._pool(span, token_ids) for span in batch.pooling]
        return StepResult(tokens, logprobs, scores, pooled)

    def _sample(self, batch: StepBatch, index: int, adapters: list[str]) -> int:
        sampling, adjustments, forbidden = batch.sampling, batch.sampling.adjustments, list[int]()
        adapter = adapters[int(batch.logits_rows[index])]
        token_ids = self._read_back(batch, int(batch.sampled[index]), adapter)
        if adjustments is not None and index in adjustments.rows:
            row = int(np.searchsorted(adjustments.rows, index))
            forbidden = tokens_of_row(adjustments.forbidden, row) + masked_tokens(adjustments, row)
            if prompt := tokens_of_row(adjustments.prompt, row):
                assert prompt + tokens_of_row(adjustments.output, row) == token_ids
        is_greedy = sampling.temperature[index] == 0
        random_number = None if is_greedy else float(sampling.uniform[index])
        return next_token(adapter, token_ids, random_number, forbidden)

    def _score(self, span: PromptLogprobsSpan) -> list[TokenLogprobs]:
        scores = [_logprobs(t, span.num_logprobs) for t in span.target_ids.tolist()]
        return [score for score in scores if score is not None]

    def _pool(self, span: PoolingSpan, token_ids: list[int]) -> npt.NDArray[np.float32]:
        """A token's hidden state is (its id, 1)."""
        rows = token_ids[span.first_row : span.first_row + span.num_rows]
        return np.array([sum(rows), len(rows)], np.float32)

    def _adapter_of_rows(self, batch: StepBatch) -> list[str]:
        adapters = [""] * len(batch.token_ids)
        indptr = batch.segment_indptr.tolist()
        for segment, (start, end) in enumerate(zip(indptr, indptr[1:], strict=False)):
            contents = self.store.page_contents[int(batch.page_tables[segment, 0])]
            for i, page in enumerate(batch.page_tables[segment].tolist()):
                if page:
                    assert self.store.page_contents[page] == (contents[0], i)
            adapters[start:end] = [contents[0]] * (end - start)
        return adapters

    def _read_back(self, batch: StepBatch, index: int, adapter: str) -> list[int]:
        token_ids = []
        for position in range(int(batch.seq_lens[index])):
            block, offset = divmod(position, self.block_size)
            slot = int(batch.block_table[index, block]) * self.block_size + offset
            written_by, written_position, token_id = self.slots[slot]
            is_base = position < batch.requests[index].adapter_start
            assert (written_by, written_position) == ("" if is_base else adapter, position)
            token_ids.append(token_id)
        return token_ids


def _logprobs(token_id: int, num_logprobs: int) -> TokenLogprobs | None:
    """Of the chosen token, and of tokens 0, 1, ... as the likeliest; None if nobody wants them."""
    if num_logprobs < 0:
        return None
    likeliest = list(range(num_logprobs))
    return TokenLogprobs([token_id, *likeliest], [-0.5] * (1 + num_logprobs), [1, *likeliest])


def tokens_of_row(tokens: TokensOfRows, row: int) -> list[int]:
    return tokens.token_ids[tokens.rows == row].tolist()


def masked_tokens(adjustments: LogitAdjustments, row: int) -> list[int]:
    """What the row's grammar, if it has one, does not admit."""
    for masked, source in zip(adjustments.masked.tolist(), adjustments.masks, strict=True):
        if masked == row:
            mask = np.zeros(-(-VOCAB_SIZE // 32), np.int32)
            if isinstance(source, np.ndarray):
                mask[:] = source
            else:
                source.fill_mask(mask)
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB_SIZE]
            return np.flatnonzero(bits == 0).tolist()
    return []


class FakeDevice:
    page_bytes = 1024

    def __init__(
        self,
        num_pages: int,
        max_model_len: int,
        block_size: int,
        steps_ahead: int,
        num_awaited_pages: int,
        tokenizer_path: str,
    ) -> None:
        self.num_pages = num_pages
        self.steps_ahead = steps_ahead
        self.num_awaited_pages = num_awaited_pages
        self.adapter_store = FakeStore()
        self.runner = FakeRunner(self.adapter_store, block_size, steps_ahead)
        self.model_info = ModelInfo(
            model_name="fake",
            tokenizer_path=tokenizer_path,
            max_model_len=max_model_len,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=[EOS_TOKEN_ID],
            dtype="float32",
            device="cpu",
        )

    def close(self) -> None:
        pass


def fake_core(
    num_pages: int,
    max_model_len: int = 64,
    block_size: int = 4,
    steps_ahead: int = 0,
    num_awaited_pages: int = 0,
    tokenizer_path: str = "",
    **options: object,
) -> EngineCore:
    """An EngineCore on a FakeDevice, which is its `_device`."""
    config = EngineConfig.from_options(
        block_size=block_size,
        **{"max_num_seqs": 8, "max_num_batched_tokens": 16, **options},
    )

    def build(config: EngineConfig, wake: Callable[[], None]) -> FakeDevice:
        return FakeDevice(
            num_pages,
            max_model_len,
            config.block_size,
            steps_ahead,
            num_awaited_pages,
            tokenizer_path,
        )

    return EngineCore(config, build)


def make_request(
    request_id: str,
    prompt_token_ids: Iterable[int],
    max_tokens: int,
    adapter: str | None = None,
    num_adapter_pages: int = 2,
    service: Service | None = None,
    eos_token_ids: Sequence[int] = (EOS_TOKEN_ID,),
    **params: Any,
) -> EngineRequest:
    """Greedy, if `params`, which are SamplingParams', do not say otherwise."""
    path = f"{adapter}:pages={num_adapter_pages}"
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt_token_ids),
        sampling_params=SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, **params}),
        max_tokens=max_tokens,
        eos_token_ids=list(eos_token_ids),
        seed=len(request_id),
        lora_request=None if adapter is None else LoRARequest(adapter, path),
        service=service or Service(),
    )


def run_to_end(core: EngineCore, max_steps: int = 10_000) -> dict[str, list[EngineOutput]]:
    """Step until nothing is left, checking integrity after each; outputs by request. At the end
    nothing is in flight, and no memory in use."""
    outputs: dict[str, list[EngineOutput]] = {}
    for _ in range(max_steps):
        if not core.has_unfinished_requests():
            assert not core._device.runner.in_flight
            stats = core.stats()
            assert stats["pages_kv"] == stats["num_running"] == stats["num_waiting"] == 0
            assert all(files.is_closed for files in core._device.adapter_store.files)
            return outputs
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
        core.check_integrity()
        core._device.adapter_store.finish_copies()
        core._device.adapter_store.finish_fetches()
    raise AssertionError("the engine does not come to an end")


def tokens_of(outputs: list[EngineOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.new_token_ids]
