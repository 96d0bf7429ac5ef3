"""A model spread over two GPUs against transformers and PEFT on the CPU."""

from __future__ import annotations

import pytest
import torch
from quantised_models import check_mixed_batch, write_quantised
from quantisers import awq

CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
TWO = {"device": "cuda", "tensor_parallel_size": 2}

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_a_mixed_batch(enforce_eager, tmp_path):
    _, dense = write_quantised(tmp_path, lambda *_: None, None, vocab_size=102)
    check_mixed_batch(dense, dense, tmp_path, enforce_eager=enforce_eager, **TWO)


def test_a_quantised_model(tmp_path):
    paths = write_quantised(tmp_path, awq, CONFIG, vocab_size=102, intermediate_size=256)
    check_mixed_batch(*paths, tmp_path, **TWO)
