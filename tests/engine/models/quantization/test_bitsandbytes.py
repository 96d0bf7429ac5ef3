"""bitsandbytes checkpoints as the package itself writes them, and plain ones rounded on load."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
from quantised_models import check_mixed_batch, check_products, write_quantised
from quantisers import bitsandbytes_4bit, bitsandbytes_int8
from transformers import GPT2Config

from loraplex.engine.models.quantization.bitsandbytes import BitsAndBytes, BitsAndBytesOnLoad
from loraplex.engine.models.quantization.methods import quantise
from loraplex.engine.models.registry import outline_model

CONFIG_OF_8_BITS = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def config_of_4_bits(kind: str, is_nested: bool) -> dict:
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": is_nested, "llm_int8_skip_modules": ["v_proj"],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("is_nested", [False, True])
def test_products_of_4_bits(kind, is_nested):
    method = BitsAndBytes(config_of_4_bits(kind, is_nested))
    check_products(method, bitsandbytes_4bit(kind, is_nested))


def test_products_of_8_bits():
    check_products(BitsAndBytes(CONFIG_OF_8_BITS), bitsandbytes_int8)


def test_mixed_batches_equal_the_dequantised_model(tmp_path):
    config = config_of_4_bits("nf4", True)
    paths = write_quantised(tmp_path / "4", bitsandbytes_4bit("nf4", True), config)
    check_mixed_batch(*paths, tmp_path / "4")
    paths = write_quantised(tmp_path / "8", bitsandbytes_int8, CONFIG_OF_8_BITS)
    check_mixed_batch(*paths, tmp_path / "8")


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_rounding_on_load(kind):
    quantise = bitsandbytes_int8 if kind == "int8" else bitsandbytes_4bit(kind)

    def on_load(module, weight):
        return {"weight": weight}, quantise(module, weight)[1]

    check_products(BitsAndBytesOnLoad(kind), on_load)


def test_a_plain_checkpoint_is_rounded_by_option(tmp_path):
    def on_load(module, weight):
        weight = weight.contiguous()
        return None if module == "lm_head" else ({"weight": weight}, rounded(weight))

    def rounded(weight):
        return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4"))

    quantised, dense = write_quantised(tmp_path, on_load, None)
    check_mixed_batch(quantised, dense, tmp_path, quantization="bitsandbytes")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of_4_bits("int4", False), "bnb_4bit_quant_type='int4'.*'nf4', 'fp4'"),
        (config_of_4_bits("nf4", False) | {"bnb_4bit_quant_storage": "bfloat16"}, "quant_storage"),
        ({"quant_method": "bitsandbytes"}, "load_in_8bit=None"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        BitsAndBytes(config)


def test_sizes_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match=r"model.layers.0.p0 .*has 48 inputs.*multiple of 64"):
        check_products(BitsAndBytesOnLoad("nf4"), None, in_features=48)


def test_weights_that_are_stored_transposed_are_refused_by_name():
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn .*stored transposed"):
        outline = outline_model(GPT2Config(architectures=["GPT2LMHeadModel"]))
        quantise((linear for _, _, linear in outline.linears()), BitsAndBytesOnLoad("nf4"))
