"""The most that one request may ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loraplex.engine.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of each request."""

    max_completions: int = 128
    """Prompts of a request times completions of each."""
    max_stop_sequences: int = 16
    max_output_tokens: int | None = None
    """Tokens of each completion; None: up to the model's length."""
    request_timeout: float | None = None
    """Seconds that a generation may take, its waiting included."""

    def check_batch(self, num_prompts: int, params: SamplingParams) -> None:
        """Raises ValueError for too many completions."""
        num_completions = num_prompts * params.n
        if num_completions > self.max_completions:
            raise ValueError(
                f"n={params.n} is not allowed with {num_prompts} prompts: a request may ask for "
                f"{self.max_completions} completions in all"
            )

    def apply(self, params: SamplingParams) -> SamplingParams:
        """The parameters, for as many tokens as are allowed where they say nothing. Raises
        ValueError for what asks for too much."""
        if len(params.stop) > self.max_stop_sequences:
            raise ValueError(
                f"stop of {len(params.stop)} strings is not allowed: it must have at most "
                f"{self.max_stop_sequences}"
            )
        limit = self.max_output_tokens
        if limit is None:
            return params
        if params.max_tokens is not None and params.max_tokens > limit:
            raise ValueError(
                f"max_tokens={params.max_tokens} is not allowed: this server generates at most "
                f"{limit}"
            )
        return replace(params, max_tokens=params.max_tokens or limit)
