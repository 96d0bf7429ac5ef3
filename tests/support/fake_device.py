"""A device half without a model: it remembers what was written to every KV slot and adapter page,
and its next token is a hash of what it reads back. Whoever mixes up blocks, adapters or positions
gets other tokens than `expected_tokens`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

from loraplex.engine.config import EngineConfig
from loraplex.engine.core import EngineCore
from loraplex.engine.request import EngineOutput, EngineRequest, LoRARequest, ModelInfo
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.step import StepBatch, StepResult

VOCAB_SIZE = 1000
EOS_TOKEN_ID = VOCAB_SIZE - 1


def next_token(adapter: str, token_ids: Sequence[int]) -> int:
    text = f"{adapter}:{','.join(map(str, token_ids))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) % EOS_TOKEN_ID


def expected_tokens(request: EngineRequest) -> list[int]:
    """The output of a request that is run alone, by the definition of the fake model."""
    adapter = request.lora_request.lora_name if request.lora_request else ""
    token_ids = list(request.prompt_token_ids)
    for _ in range(request.max_tokens):
        token_ids.append(next_token(adapter, token_ids))
    return token_ids[len(request.prompt_token_ids) :]


class FakeStore:
    """An adapter of path "pages=N" has N pages; "fail" fails. Loads take `num_polls` polls, and a
    copy is done when the device is asked for the next step but one."""

    def __init__(self, num_polls: int = 2) -> None:
        self.page_contents: dict[int, tuple[str, int]] = {}
        self.paths: dict[bytes, str] = {}
        self.polls: dict[bytes, int] = {}
        self.copies: list[tuple[Future[None], list[tuple[int, tuple[str, int]]]]] = []
        self.num_polls = num_polls

    def num_pages(self, version: bytes, path: str) -> int | None:
        self.paths[version] = path
        self.polls[version] = self.polls.get(version, 0) + 1
        if self.polls[version] <= self.num_polls:
            return None
        if "fail" in path:
            raise ValueError(f"adapter {path} can't be served")
        return int(path.split("=")[1])

    def max_rank(self, version: bytes) -> int:
        return 8

    def copy_to_pages(self, version: bytes, pages: list[int]) -> Future[None]:
        future: Future[None] = Future()
        name = self.paths[version].split(":")[0]
        self.copies.append((future, [(page, (name, i)) for i, page in enumerate(pages)]))
        return future

    def fingerprint(self, path: str) -> str:
        return path

    def finish_copies(self) -> None:
        for future, contents in self.copies:
            self.page_contents.update(contents)
            future.set_result(None)
        self.copies.clear()


class FakeRunner:
    def __init__(self, store: FakeStore, block_size: int) -> None:
        self.store = store
        self.block_size = block_size
        self.slots: dict[int, tuple[str, int, int]] = {}
        self.batches: list[int] = []

    def execute(self, batch: StepBatch) -> StepResult:
        self.batches.append(len(batch.token_ids))
        adapters = self._adapter_of_rows(batch)
        for row, slot in enumerate(batch.slot_mapping.tolist()):
            assert slot >= self.block_size, "nobody writes to the scratch page"
            position, token_id = int(batch.positions[row]), int(batch.token_ids[row])
            self.slots[slot] = adapters[row], position, token_id
        tokens = []
        for index, row in zip(batch.sampled.tolist(), batch.logits_rows.tolist(), strict=True):
            tokens.append(next_token(adapters[row], self._read_back(batch, index, adapters[row])))
        return StepResult(token_ids=tokens, logprobs=None, prompt_logprobs=[])

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
            assert (written_by, written_position) == (adapter, position)
            token_ids.append(token_id)
        return token_ids


class FakeDevice:
    page_bytes = 1024

    def __init__(self, num_pages: int, max_model_len: int, block_size: int) -> None:
        self.num_pages = num_pages
        self.adapter_store = FakeStore()
        self.runner = FakeRunner(self.adapter_store, block_size)
        self.model_info = ModelInfo(
            model_name="fake",
            tokenizer_path="",
            max_model_len=max_model_len,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=[EOS_TOKEN_ID],
        )

    def close(self) -> None:
        pass


def fake_core(
    num_pages: int, max_model_len: int = 64, block_size: int = 4, **options: object
) -> EngineCore:
    """An EngineCore on a FakeDevice, which is its `_device`."""
    config = EngineConfig.from_options(
        block_size=block_size,
        **{"max_num_seqs": 8, "max_num_batched_tokens": 16, **options},
    )

    def build(config: EngineConfig, wake: Callable[[], None]) -> FakeDevice:
        return FakeDevice(num_pages, max_model_len, config.block_size)

    return EngineCore(config, build)


def make_request(
    request_id: str,
    prompt_token_ids: Iterable[int],
    max_tokens: int,
    adapter: str | None = None,
    num_adapter_pages: int = 2,
    tenant: str = "",
) -> EngineRequest:
    path = f"{adapter}:pages={num_adapter_pages}"
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt_token_ids),
        sampling_params=SamplingParams(temperature=0, max_tokens=max_tokens),
        max_tokens=max_tokens,
        eos_token_ids=[EOS_TOKEN_ID],
        seed=0,
        lora_request=None if adapter is None else LoRARequest(adapter, path),
        tenant=tenant,
    )


def run_to_end(core: EngineCore, max_steps: int = 10_000) -> dict[str, list[EngineOutput]]:
    """Step until nothing is left, checking integrity after each; outputs by request."""
    outputs: dict[str, list[EngineOutput]] = {}
    for _ in range(max_steps):
        if not core.has_unfinished_requests():
            return outputs
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
        core.check_integrity()
        core._device.adapter_store.finish_copies()
    raise AssertionError("the engine does not come to an end")


def tokens_of(outputs: list[EngineOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.new_token_ids]
