"""The bytes of a decode step, against figures worked out by hand for Llama-3-8B on an H100."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, MixtralConfig

from loraplex.benchmarks.roofline import (
    DecodeBytes,
    adapter_counts,
    offline_seconds,
    token_flops,
)
from loraplex.benchmarks.synthetic_model import SHAPES
from loraplex.benchmarks.workloads import m1


@pytest.fixture(scope="module")
def llama() -> LlamaConfig:
    return LlamaConfig(architectures=["LlamaForCausalLM"], **SHAPES["llama-3-8b"])


def test_bytes_of_llama_3_8b(llama):
    needs = DecodeBytes.of_model(llama, 2)
    assert needs.weights == pytest.approx(15.009e9, rel=1e-4)
    assert needs.rank == 5 << 20
    assert needs.kv_token == 128 << 10
    # q, k, v and o have 8192 + 2 * 5120 + 8192 elements of each rank in a layer.
    attention = DecodeBytes.of_model(llama, 2, ["q_proj", "k_proj", "v_proj", "o_proj"])
    assert attention.rank == 2 * 32 * 26624
    assert DecodeBytes.of_model(llama, 4).weights == 2 * needs.weights
    float8 = DecodeBytes.of_model(llama, 2, kv_dtype_bytes=1)
    assert (float8.weights, float8.kv_token) == (needs.weights, 64 << 10)


@pytest.mark.parametrize(
    ("rank", "batch", "adapters", "milliseconds"),
    [
        (8, 1, 0, 5.03),
        (8, 256, 256, 14.32),
        (16, 64, 0, 6.44),
        (16, 64, 16, 6.88),
        (16, 64, 64, 8.23),
        (16, 128, 128, 11.45),
        (64, 16, 16, 7.15),
        (64, 256, 64, 17.90),
    ],
)
def test_milliseconds_at_3_terabytes_a_second(llama, rank, batch, adapters, milliseconds):
    num_bytes = DecodeBytes.of_model(llama, 2).step(batch, adapters, rank, context=512)
    assert num_bytes / 3.0e12 * 1e3 == pytest.approx(milliseconds, abs=0.006)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_bytes_of_quantised_weights(llama, method):
    quantised = LlamaConfig(architectures=["LlamaForCausalLM"], **SHAPES[f"llama-3-8b-{method}"])
    # Half a byte each; for each 128 a scale of two bytes and a zero of half a byte.
    layers, head = token_flops(llama) / 2, 4096 * 128_256
    assert DecodeBytes.of_model(quantised, 2).weights == layers * (0.5 + 2.5 / 128) + 2 * head
    assert token_flops(quantised) == token_flops(llama)


def test_flops_of_a_token(llama):
    # q, k, v and o; gate, up and down, in each of 32 layers.
    layer = 4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336
    assert token_flops(llama) == 2 * 32 * layer
    mixtral = MixtralConfig(**SHAPES["mixtral-12-layers"])
    attention, expert = 4096 * (4096 + 2 * 1024 + 4096), 3 * 4096 * 14336
    assert token_flops(mixtral) == 2 * 12 * (attention + 4096 * 8 + 2 * expert), "2 of 8 experts"


@pytest.mark.parametrize(("num_adapters", "seconds"), [(0, 4.474), (1000, 5.013)])
def test_seconds_of_m1(llama, num_adapters, seconds):
    needs = DecodeBytes.of_model(llama, 2, ["q_proj", "k_proj", "v_proj", "o_proj"])
    workload = m1(num_adapters)
    assert offline_seconds(
        needs, token_flops(llama), workload, 256, 16, 3.0e12, 798e12
    ) == pytest.approx(seconds, abs=0.001)


def test_adapter_counts():
    wanted = [0, 16, "batch", 64, 1]
    assert adapter_counts(64, wanted) == [0, 16, 64, 1]
    assert adapter_counts(256, wanted) == [0, 16, 256, 64, 1]
    assert adapter_counts(1, wanted) == [0, 1]
