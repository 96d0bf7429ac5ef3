"""The oracle: transformers and PEFT in float32, one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from transformers import AutoConfig, DynamicCache

from loraplex import RequestOutput


@dataclass(frozen=True)
class Scored:
    """What the oracle says of a sequence, for each of its output tokens."""

    greedy_token_ids: list[int]
    """What it would have chosen, given everything before."""
    logprobs: list[float]
    """Of the tokens that were chosen."""
    greedy_logprobs: list[float]


class Float8Cache(DynamicCache):
    """Keys and values are rounded to float8 before anything attends to them."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (
            x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)
            for x in (key_states, value_states)
        )
        return super().update(k, v, *args, **kwargs)


class Oracle:
    """The base model and adapters, as transformers and PEFT compute them."""

    def __init__(
        self,
        model_path: Path,
        adapters: dict[str, Path],
        float8_kv: bool = False,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._make_cache = Float8Cache if float8_kv else DynamicCache
        config = AutoConfig.from_pretrained(model_path)
        (architecture,) = config.architectures
        # Some versions of transformers drop soft caps, if it is not told to be eager.
        has_cap = getattr(config, "attn_logit_softcapping", None)
        model = getattr(transformers, architecture).from_pretrained(
            model_path, dtype=dtype, attn_implementation="eager" if has_cap else None
        )
        self.model = model.eval()
        for name, path in adapters.items():
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(str(path), adapter_name=name)
            else:
                self.model = PeftModel.from_pretrained(model, str(path), adapter_name=name).eval()
        self.model.to(device)

    @contextmanager
    def _adapter(self, name: str | None) -> Iterator[None]:
        if name is not None:
            self.model.set_adapter(name)
            yield
        elif isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield
        else:
            yield

    @torch.inference_mode()
    def score(self, prompt: list[int], output: list[int], adapter: str | None) -> Scored:
        """One forward pass over prompt and output. If greedy_token_ids equals the output, then the
        output is exactly what greedy decoding by the oracle gives."""
        with self._adapter(adapter):
            logits = self.model(
                torch.tensor([prompt + output[:-1]], device=self.model.device),
                past_key_values=self._make_cache(),
            ).logits[0, len(prompt) - 1 :]
        logprobs = logits.float().log_softmax(-1).cpu()
        return Scored(
            greedy_token_ids=logits.argmax(-1).tolist(),
            greedy_logprobs=logprobs.amax(-1).tolist(),
            logprobs=logprobs[torch.arange(len(output)), torch.tensor(output)].tolist(),
        )

    @torch.inference_mode()
    def embed(self, prompt: list[int], adapter: str | None, pooling: str) -> torch.Tensor:
        """The prompt's embedding, [hidden_size]: of the last layer's normalised output."""
        with self._adapter(adapter):
            hidden = self.model(
                torch.tensor([prompt], device=self.model.device), output_hidden_states=True
            ).hidden_states[-1][0]
        pooled = hidden[-1] if pooling == "last" else hidden.mean(0)
        return (pooled / pooled.norm()).float().cpu()

    def assert_equals(
        self, adapters: list[str | None], outputs: list[RequestOutput], tolerance: float = 1e-3
    ) -> None:
        """Outputs, made greedily and with logprobs=0 by these adapters, are what the oracle gives:
        all tokens, and their log-probabilities within the tolerance."""
        worst = 0.0
        for name, output in zip(adapters, outputs, strict=True):
            prompt, completion = output.prompt_token_ids, output.outputs[0]
            scored = self.score(prompt, completion.token_ids, name)
            assert completion.token_ids == scored.greedy_token_ids, (name, len(prompt))
            for token_id, logprobs, expected in zip(
                completion.token_ids, completion.logprobs, scored.logprobs, strict=True
            ):
                worst = max(worst, abs(logprobs[token_id].logprob - expected))
        assert worst < tolerance
