"""Keeps outputs to their grammars: compiles them in threads, and masks tokens step by step.

xgrammar does the work; this is the one place that knows it. Imported late, since it brings torch.
"""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from loraplex.engine.errors import RequestError, describe
from loraplex.engine.request import Request
from loraplex.engine.structured_outputs.params import MAX_WHITESPACE, StructuredOutputsParams

# Compiled grammars are kept up to about this many bytes, and their parts up to as many.
CACHE_BYTES = 256 << 20
NUM_WORKERS = 2
# xgrammar's messages begin with a time and a place in its source.
SOURCE_PLACE = re.compile(r"^\[[\d:]+\] \S+: (Check failed: \(.*?\) is false: )?")


@dataclass(frozen=True, slots=True)
class AdmittedTokens:
    """What a grammar admits at one place: as much of it as other processes get."""

    mask: npt.NDArray[np.int32]  # as Grammar.fill_mask fills it

    @property
    def mask_words(self) -> int:
        return len(self.mask)

    def admits(self, token_id: int) -> bool:
        is_known = token_id // 32 < len(self.mask)
        return is_known and bool(self.mask[token_id // 32] >> token_id % 32 & 1)

    def fill_mask(self, mask: npt.NDArray[np.int32]) -> None:
        mask[:] = self.mask


class Grammar:
    """One request's grammar: on its way from the compiler, then followed token by token."""

    def __init__(
        self, compiled: Future[Any], eos_token_ids: Sequence[int], vocab_size: int
    ) -> None:
        self.mask_words = -(-vocab_size // 32)
        """int32 words in a mask."""
        self._vocab_size = vocab_size
        self._compiled = compiled
        self._eos_token_ids = list(eos_token_ids)
        self._matcher: Any = None
        # Tokens without text, which no grammar admits. xgrammar writes a warning if it is asked.
        self._textless: frozenset[int] = frozenset()

    def __reduce__(self) -> tuple[type[AdmittedTokens], tuple[npt.NDArray[np.int32]]]:
        mask = np.empty(self.mask_words, np.int32)
        self.fill_mask(mask)
        return AdmittedTokens, (mask,)

    def is_ready(self) -> bool:
        """Whether it is compiled. Raises RequestError if it can't be."""
        if self._matcher is None and self._compiled.done():
            import xgrammar

            try:
                compiled = self._compiled.result()
            except RequestError:
                raise
            except Exception as error:
                raise RequestError(f"the grammar compiler failed: {error!r}", 500) from error
            self._matcher = xgrammar.GrammarMatcher(
                compiled, override_stop_tokens=self._eos_token_ids
            )
            textless = compiled.tokenizer_info.special_token_ids
            self._textless = frozenset(textless) - frozenset(self._eos_token_ids)
        return self._matcher is not None

    def accept(self, token_id: int) -> bool:
        """Go on with this token; False if the grammar does not admit it."""
        return self._matcher.accept_token(token_id)

    def admits(self, token_id: int) -> bool:
        """Whether this token may follow. It takes some microseconds, `fill_mask` up to thousands
        of times as long."""
        # An adapter's own tokens are none that the grammar knows.
        if token_id in self._textless or token_id >= self._vocab_size:
            return False
        if not self._matcher.accept_token(token_id):
            return False
        self._matcher.rollback(1)
        return True

    def fill_mask(self, mask: npt.NDArray[np.int32]) -> None:
        """mask [mask_words]: set bit t % 32 of word t // 32 where token t may follow, and clear the
        others.

        A grammar that admits nothing more gets a mask that admits all: the sampler needs a token,
        and `accept` will refuse it."""
        self._matcher.fill_next_token_bitmask(mask[None])
        if not mask.any():
            mask.fill(-1)


class GrammarCompiler:
    """Compiles in threads of its own, each grammar once while it is remembered."""

    def __init__(
        self, tokenizer_path: str, vocab_size: int, on_compiled: Callable[[], None]
    ) -> None:
        """vocab_size: of the model's logits. on_compiled is called, in any thread, when a grammar
        became ready or failed."""
        self._tokenizer_path = tokenizer_path
        self._vocab_size = vocab_size
        self._on_compiled = on_compiled
        self._executor = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="loraplex-grammar")
        self._xgrammar: Future[Any] | None = None
        # In order of use, the last used at the end.
        self._cache: OrderedDict[StructuredOutputsParams, Future[Any]] = OrderedDict()

    def start(self, params: StructuredOutputsParams, eos_token_ids: Sequence[int]) -> Grammar:
        """A grammar that is ready now if it is remembered, and soon otherwise.

        Raises RequestError if nothing could end the output."""
        if not eos_token_ids:
            raise RequestError(
                "structured_outputs is not allowed: this model has no end-of-sequence token, by "
                "which an output could end"
            )
        compiled = self._cache.get(params)
        if compiled is None or (compiled.done() and compiled.exception() is not None):
            self._forget_the_oldest()
            if self._xgrammar is None:
                # First in the queue of the threads, so that others may wait for it there.
                self._xgrammar = self._executor.submit(self._load)
            compiled = self._executor.submit(partial(self._compile, self._xgrammar, params))
            compiled.add_done_callback(lambda _: self._on_compiled())
            self._cache[params] = compiled
        self._cache.move_to_end(params)
        return Grammar(compiled, eos_token_ids, self._vocab_size)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _forget_the_oldest(self) -> None:
        sizes = {
            params: compiled.result().memory_size_bytes
            for params, compiled in self._cache.items()
            if compiled.done() and compiled.exception() is None
        }
        total = sum(sizes.values())
        for params, size in sizes.items():
            if total <= CACHE_BYTES:
                break
            total -= size
            del self._cache[params]

    def _load(self) -> Any:
        """xgrammar's compiler for this tokenizer, which takes a second."""
        import xgrammar
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._tokenizer_path)
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=self._vocab_size)
        # Special tokens are left out of the text, and so they must not pass for what they are
        # called. One without text is never admitted.
        vocab, special_ids = [""] * self._vocab_size, set(tokenizer.all_special_ids)
        for text, token_id in tokenizer.get_vocab().items():
            if token_id < self._vocab_size and token_id not in special_ids:
                vocab[token_id] = text
        info = xgrammar.TokenizerInfo(
            vocab,
            vocab_type=info.vocab_type,
            vocab_size=self._vocab_size,
            stop_token_ids=info.stop_token_ids,
            add_prefix_space=info.add_prefix_space,
        )
        return xgrammar.GrammarCompiler(
            info,
            max_threads=max(1, (os.cpu_count() or 1) // 4),
            # It remembers parts, too: schemas that are alike compile in a fraction of the time.
            cache_limit_bytes=CACHE_BYTES,
        )

    def _compile(self, loading: Future[Any], params: StructuredOutputsParams) -> Any:
        compiler, text = loading.result(), params.text
        options: dict[str, Any] = {"max_whitespace_cnt": MAX_WHITESPACE}
        if params.disable_any_whitespace:
            options = {"any_whitespace": False}
        try:
            match params.kind:
                case "json":
                    return compiler.compile_json_schema(text, **options)
                case "json_object":
                    return compiler.compile_json_schema('{"type": "object"}', **options)
                case "regex":
                    return compiler.compile_regex(text)
                case "structural_tag":
                    return compiler.compile_structural_tag(text)
                case "grammar":
                    return compiler.compile_grammar(text)
                case _:
                    return compiler.compile_grammar(_grammar_of_choices(params.choice or ()))
        except (RuntimeError, ValueError) as error:
            reason = SOURCE_PLACE.sub("", str(error)).strip()
            raise RequestError(
                f"structured_outputs.{params.kind}={describe(text)} is not allowed: {reason}"
            ) from error


class CompilingRequests:
    """The requests whose grammars are not ready. They are in no queue: nobody waits behind them."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, request: Request) -> None:
        self._requests.append(request)

    def remove(self, request: Request) -> None:
        self._requests.remove(request)

    def take_ready(self) -> Iterator[tuple[Request, RequestError | None]]:
        """Those whose grammars are ready now, and those whose failed, with the error."""
        for request in self._requests.copy():
            assert request.grammar is not None
            failure = None
            try:
                if not request.grammar.is_ready():
                    continue
            except RequestError as error:
                failure = error
            self._requests.remove(request)
            yield request, failure


def dead_end(request: Request) -> RequestError:
    """The error of a request whose grammar refused its token."""
    return RequestError(
        f"structured_outputs is not allowed: after {request.num_output_tokens} tokens nothing can "
        "follow by it"
    )


def _grammar_of_choices(choices: Sequence[str]) -> str:
    # JSON's strings are EBNF's, but for slashes, which JSON escapes only if it is asked to.
    return "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
