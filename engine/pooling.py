"""Adds up the hidden states of a prompt while its chunks are computed. No torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class PooledPrompt:
    """What a prompt's embedding is made of, so far."""

    def __init__(self, pooling: str, num_prompt_tokens: int) -> None:
        """pooling: as in SamplingParams."""
        self._first = 0 if pooling == "mean" else num_prompt_tokens - 1
        self._end = num_prompt_tokens
        self._sum: npt.NDArray[np.float32] | None = None
        self._num_summed = 0
        # Of which token on no step in flight adds any more.
        self._num_planned = 0

    def plan(self, start: int, end: int) -> tuple[int, int]:
        """Of the tokens [start, end) that a step computes, those that it is to add up."""
        start = max(start, self._first, self._num_planned)
        end = min(end, self._end)
        if start < end:
            self._num_planned = end
        return start, end

    def add(self, hidden_sum: npt.NDArray[np.float32], num_tokens: int) -> None:
        """Take in the sum, [hidden_size], of so many tokens."""
        self._sum = hidden_sum if self._sum is None else self._sum + hidden_sum
        self._num_summed += num_tokens

    def forget_pending(self) -> None:
        """The steps in flight come to nothing."""
        self._num_planned = self._first + self._num_summed

    def embedding(self) -> bytes | None:
        """The mean as float32 [hidden_size], once there is one."""
        return None if self._sum is None else (self._sum / self._num_summed).tobytes()
