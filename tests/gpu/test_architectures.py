"""Every architecture, tiny and random, on a CUDA device: float32 as transformers and PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import CASES, FALLBACK_CASES
from tiny_models import check_tiny_model


@pytest.mark.parametrize("case", [*CASES, *FALLBACK_CASES])
def test_a_mixed_batch_equals_transformers_and_peft(case: str, tmp_path: Path):
    check_tiny_model(case, tmp_path, "cuda")
