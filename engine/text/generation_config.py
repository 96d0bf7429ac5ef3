"""What a model directory says of how its output ends and is sampled. Knows no tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loraplex.engine.sampling_params import SamplingParams

GENERATION_CONFIG = "generation_config.json"
# Of its fields, those that are SamplingParams' too.
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_eos_token_ids(path: str | Path) -> list[int]:
    """The end-of-sequence ids that a model directory's config.json and generation_config.json
    name, sorted; chat models often end their turns with one that only the second names."""
    token_ids: set[int] = set()
    for name in ("config.json", GENERATION_CONFIG):
        values = _read(Path(path) / name)
        for part in (values, values.get("text_config") or {}):
            eos_token_id = part.get("eos_token_id")
            if eos_token_id is not None:
                token_ids.update(eos_token_id if isinstance(eos_token_id, list) else [eos_token_id])
    return sorted(token_ids)


def read_default_sampling(path: str | Path) -> dict[str, float]:
    """The sampling parameters that generation_config.json recommends.

    Raises ValueError naming one that is not allowed.
    """
    values = _read(Path(path) / GENERATION_CONFIG)
    defaults = {name: values[name] for name in SAMPLING_FIELDS if values.get(name) is not None}
    try:
        SamplingParams(**defaults)
    except ValueError as error:
        raise ValueError(f"{GENERATION_CONFIG} of model={str(path)!r}: {error}") from error
    return defaults


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    values: dict[str, Any] = json.loads(file.read_text())
    return values
