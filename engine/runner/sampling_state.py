"""How the running requests want their tokens chosen, as arrays. No torch.

`SamplingState` keeps a row per slot between steps; `SamplingBatch` is what a step takes out of it.

Randomness is a pure function of (seed, position in the output): one uniform number per token, from
SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014) used as
a counter-based hash. So a request's tokens depend neither on its batch nor on preemption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loraplex.engine.messages import EngineRequest
from loraplex.engine.runner.bad_words import BadWords
from loraplex.engine.structured_outputs.grammar import AdmittedTokens, Grammar

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

# In a worker process a grammar is what it admits at its place.
AnyGrammar = Grammar | AdmittedTokens

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
EVERYTHING = np.iinfo(np.int32).max
NO_LOGPROBS = -1
NO_TOKENS = np.zeros(0, np.int64)
# Where the second numbers for the positions of an output begin, among a generator's outputs.
AGAIN = np.int64(1 << 32)


@dataclass(slots=True)
class TokensOfRows:
    """Any number of tokens for each of some rows, flat."""

    rows: Int64Array  # [N], ascending
    token_ids: Int64Array  # [N]

    def below(self, vocab_size: int) -> TokensOfRows:
        """Those that there are logits for."""
        is_there = self.token_ids < vocab_size
        return TokensOfRows(self.rows[is_there], self.token_ids[is_there])


@dataclass(slots=True)
class LogitAdjustments:
    """Changes to the logits of the A rows of a batch that want any.

    The rows in TokensOfRows are indices into `rows`.
    """

    rows: Int64Array  # [A], rows of the batch, ascending
    biased: TokensOfRows  # no token twice in a row
    biases: Float32Array  # for each of `biased`
    forbidden: TokensOfRows  # what ends the output, before min_tokens; ends of bad words
    prompt: TokensOfRows  # of rows with penalties, and so is `output`
    output: TokensOfRows
    repetition: Float32Array  # [A], 1 where there is no penalty
    presence: Float32Array  # [A], 0 where there is no penalty
    frequency: Float32Array  # [A], 0 where there is no penalty
    masked: Int64Array  # [M], indices into `rows`, ascending: of grammars and allowed_token_ids
    masks: list[AnyGrammar | Int32Array]  # [M], what gives or is a mask: bits, as fill_mask says
    uniform_again: Float64Array  # [M], in [0, 1): to choose by when a grammar refused a token
    needs_output: bool  # whether they depend on the tokens before, which the host had to know


@dataclass(slots=True)
class SamplingBatch:
    """How to choose the tokens of R rows of logits: from the host to the device, every step."""

    temperature: Float32Array  # [R], 0 is greedy
    top_k: Int32Array  # [R], EVERYTHING keeps all
    top_p: Float64Array  # [R]
    min_p: Float64Array  # [R]
    uniform: Float64Array  # [R], in [0, 1): what decides between the tokens
    num_logprobs: Int32Array  # [R], NO_LOGPROBS where none are wanted
    adjustments: LogitAdjustments | None

    @property
    def needs_output(self) -> bool:
        """Whether a row is chosen by the tokens before it, which the host had to know."""
        return self.adjustments is not None and self.adjustments.needs_output

    def select(self, rows: Int64Array) -> SamplingBatch:
        """These rows as a batch, without adjustments."""
        return SamplingBatch(
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
            uniform=self.uniform[rows],
            num_logprobs=self.num_logprobs[rows],
            adjustments=None,
        )


@dataclass(slots=True)
class _SlotAdjustments:
    biased: Int64Array
    biases: Float32Array
    ends: Int64Array  # end-of-sequence and stop tokens
    min_tokens: int
    bad_words: BadWords
    allowed_token_ids: Int64Array  # empty for all
    has_penalties: bool
    mask: AnyGrammar | Int32Array | None  # those of a grammar, or one of allowed_token_ids

    @property
    def needs_output(self) -> bool:
        return (
            self.has_penalties
            or self.bad_words.needs_output
            or not isinstance(self.mask, np.ndarray | None)
        )

    def forbidden(self, output: Int32Array) -> Int64Array:
        """What must not follow this output. Where nothing else is allowed, it may: there must be
        a token."""
        parts = self.bad_words.next_tokens(output)
        if len(output) < self.min_tokens:
            parts.append(self.ends)
        if not parts:
            return NO_TOKENS
        forbidden = np.concatenate(parts)
        allowed = self.allowed_token_ids
        if 0 < len(allowed) <= len(forbidden) and np.isin(allowed, forbidden).all():
            return NO_TOKENS
        return forbidden


class SamplingState:
    """Sampling parameters of the running requests, by slot."""

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        """vocab_size: of the logits."""
        self._mask_words = -(-vocab_size // 32)
        self._temperature = np.zeros(max_num_seqs, np.float32)
        self._top_k = np.zeros(max_num_seqs, np.int32)
        self._top_p = np.zeros(max_num_seqs)
        self._min_p = np.zeros(max_num_seqs)
        self._repetition = np.zeros(max_num_seqs, np.float32)
        self._presence = np.zeros(max_num_seqs, np.float32)
        self._frequency = np.zeros(max_num_seqs, np.float32)
        self._num_logprobs = np.zeros(max_num_seqs, np.int32)
        self._generator = np.zeros(max_num_seqs, np.uint64)
        # Rare things are in the dict; logits are adjusted while the output is shorter than this.
        self._adjusted_until = np.zeros(max_num_seqs, np.int64)
        self._adjustments: dict[int, _SlotAdjustments] = {}

    def add(self, slot: int, request: EngineRequest, grammar: AnyGrammar | None = None) -> None:
        """Take in the parameters of a request that begins to run in this slot."""
        params = request.sampling_params
        self._temperature[slot] = 0.0 if params.is_greedy else params.temperature
        self._top_k[slot] = params.top_k if params.top_k > 0 else EVERYTHING
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._repetition[slot] = params.repetition_penalty
        self._presence[slot] = params.presence_penalty
        self._frequency[slot] = params.frequency_penalty
        self._num_logprobs[slot] = NO_LOGPROBS if params.logprobs is None else params.logprobs
        self._generator[slot] = generator_state(request.seed)

        eos_token_ids = [] if params.ignore_eos else request.eos_token_ids
        ends = {*params.stop_token_ids, *eos_token_ids}
        allowed = params.allowed_token_ids
        if (
            params.has_penalties
            or params.logit_bias
            or request.bad_words_token_ids
            or allowed is not None
            or grammar is not None
        ):
            self._adjusted_until[slot] = EVERYTHING
        else:
            self._adjusted_until[slot] = params.min_tokens if ends else 0
        self._adjustments[slot] = _SlotAdjustments(
            biased=np.array(list(params.logit_bias), np.int64),
            biases=np.array(list(params.logit_bias.values()), np.float32),
            ends=np.array(sorted(ends), np.int64),
            min_tokens=params.min_tokens,
            bad_words=BadWords(request.bad_words_token_ids),
            allowed_token_ids=np.array(allowed or (), np.int64),
            has_penalties=params.has_penalties,
            mask=grammar if allowed is None else _mask(allowed, self._mask_words),
        )

    def remove(self, slot: int) -> None:
        """Forget the request of this slot."""
        del self._adjustments[slot]

    def gather(
        self,
        slots: Int64Array,
        num_output_tokens: Int32Array,
        token_ids: Int32Array,
        num_prompt_tokens: Int32Array,
        num_tokens: Int32Array,
    ) -> SamplingBatch:
        """The batch for the next tokens of these slots.

        slots [R] and num_output_tokens [R] (how many each has so far) are by row; token_ids
        [max_num_seqs or more, max_len], num_prompt_tokens and num_tokens [max_num_seqs] are by
        slot. Of token_ids only those of slots whose tokens depend on them are read.
        """
        adjusted = np.flatnonzero(num_output_tokens < self._adjusted_until[slots])
        adjustments = None
        if len(adjusted):
            adjustments = self._gather_adjustments(
                adjusted, slots[adjusted], token_ids, num_prompt_tokens, num_tokens
            )
        return SamplingBatch(
            temperature=self._temperature[slots],
            top_k=self._top_k[slots],
            top_p=self._top_p[slots],
            min_p=self._min_p[slots],
            uniform=uniform(self._generator[slots], num_output_tokens),
            num_logprobs=self._num_logprobs[slots],
            adjustments=adjustments,
        )

    def _gather_adjustments(
        self,
        rows: Int64Array,
        slots: Int64Array,
        token_ids: Int32Array,
        num_prompt_tokens: Int32Array,
        num_tokens: Int32Array,
    ) -> LogitAdjustments:
        states, forbidden, prompts, outputs = [], [], [], []
        for slot in slots.tolist():
            state = self._adjustments[slot]
            num_prompt = num_prompt_tokens[slot]
            output = token_ids[slot, num_prompt : num_tokens[slot]]
            states.append(state)
            forbidden.append(state.forbidden(output))
            prompts.append(token_ids[slot, :num_prompt] if state.has_penalties else NO_TOKENS)
            outputs.append(output if state.has_penalties else NO_TOKENS)
        masked = np.array([i for i, s in enumerate(states) if s.mask is not None], np.int64)
        num_output_tokens = num_tokens[slots[masked]] - num_prompt_tokens[slots[masked]]
        return LogitAdjustments(
            rows=rows,
            biased=_flatten([state.biased for state in states]),
            biases=np.concatenate([state.biases for state in states]),
            forbidden=_flatten(forbidden),
            prompt=_flatten(prompts),
            output=_flatten(outputs),
            repetition=self._repetition[slots],
            presence=self._presence[slots],
            frequency=self._frequency[slots],
            masked=masked,
            masks=[s.mask for s in states if s.mask is not None],
            uniform_again=uniform(self._generator[slots[masked]], num_output_tokens + AGAIN),
            needs_output=any(state.needs_output for state in states),
        )


def _mask(token_ids: Sequence[int], num_words: int) -> Int32Array:
    """These tokens as bits."""
    bits = np.zeros(32 * num_words, np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def _flatten(token_ids_of_rows: list[npt.NDArray]) -> TokensOfRows:
    lengths = [len(token_ids) for token_ids in token_ids_of_rows]
    return TokensOfRows(
        rows=np.repeat(np.arange(len(lengths)), lengths),
        token_ids=np.concatenate(token_ids_of_rows, dtype=np.int64),
    )


def generator_state(seed: int) -> np.uint64:
    """Where the generator of a seed (any integer) starts. Mixed, so that the generators of seeds
    side by side have nothing in common."""
    return _mix(np.array([seed % 2**64], np.uint64) + GOLDEN_GAMMA)[0]


def uniform(state: UInt64Array, position: Int32Array | Int64Array) -> Float64Array:
    """Numbers in [0, 1), 53 random bits each: the outputs number `position`, from 0 on, of the
    generators that start in these states."""
    step = position.astype(np.uint64) + np.uint64(1)
    bits = _mix(state + step * GOLDEN_GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: UInt64Array) -> UInt64Array:
    """SplitMix64's output function."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
