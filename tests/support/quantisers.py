"""Quantises weights as the methods' own packages do, or by the layouts that they publish.

A quantiser takes the name of a module and its weights, float32 [out_features, in_features], and
returns the tensors of a checkpoint by the ends of their names, and the weights they stand for; None
for the head. Integers are rounded to the nearest: better choices are stored the same way.
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
import torch
from compressed_tensors.compressors import pack_to_int32


def round_to_groups(
    weight: torch.Tensor, group_size: int, bits: int = 4, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounds to the nearest: (values int32 [out, in], scales float16 [out, groups], zeros int32
    [out, groups]), where (values - zeros) * scales is about the weight."""
    groups = weight.unflatten(1, (-1, group_size))
    top = 2**bits - 1
    if symmetric:
        scales = (groups.abs().amax(-1) * 2 / top).half()
        zeros = torch.full(scales.shape, (top + 1) // 2)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / top).half()
        zeros = (-low / scales).round()
    values = (groups / scales.unsqueeze(-1) + zeros.unsqueeze(-1)).round().clamp(0, top)
    return values.flatten(1).int(), scales, zeros.int()


def dequantise_groups(
    values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> torch.Tensor:
    groups = values.unflatten(1, (scales.shape[1], -1)) - zeros.unsqueeze(-1)
    return (groups * scales.float().unsqueeze(-1)).flatten(1)


def pack_int32(values: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [..., n] -> int32 [..., n * bits / 32], the first in the lowest bits."""
    fields = values.long().unflatten(-1, (-1, 32 // bits))
    return (fields << (bits * torch.arange(32 // bits))).sum(-1).to(torch.int32)


# AutoAWQ's: output columns in the order of an int32's nibbles, from the lowest.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def awq(module, weight, group_size=32):
    if module == "lm_head":
        return None
    values, scales, zeros = round_to_groups(weight, group_size)

    def pack(columns: torch.Tensor) -> torch.Tensor:
        return pack_int32(columns.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1), 4)

    tensors = {"qweight": pack(values.T), "qzeros": pack(zeros.T), "scales": scales.T}
    return tensors, dequantise_groups(values, scales, zeros)


def gptq(config, seed=0):
    """By the layout of AutoGPTQ and GPTQModel; config: the fields of their quantization_config."""
    generator = torch.Generator().manual_seed(seed)

    def quantise(module, weight):
        if module == "lm_head":
            return None
        bits, num_inputs = config["bits"], weight.shape[1]
        group_size = num_inputs if config["group_size"] == -1 else config["group_size"]
        order = torch.arange(num_inputs)
        if config["desc_act"]:
            order = torch.randperm(num_inputs, generator=generator)
        groups = torch.empty(num_inputs, dtype=torch.int32)
        groups[order] = torch.arange(num_inputs, dtype=torch.int32) // group_size
        values, scales, zeros = round_to_groups(weight[:, order], group_size, bits, config["sym"])
        stands_for = torch.empty_like(weight)
        stands_for[:, order] = dequantise_groups(values, scales, zeros)
        in_place = torch.empty_like(values)
        in_place[:, order] = values
        if config.get("checkpoint_format") != "gptq_v2":
            zeros = zeros - 1 & 2**bits - 1
        tensors = {
            "qweight": pack_int32(in_place, bits).T,
            "qzeros": pack_int32(zeros.T, bits),
            "scales": scales.T,
            "g_idx": groups,
        }
        return tensors, stands_for

    return quantise


def to_float8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def fp8_per_tensor(module, weight):
    if module == "lm_head":
        return None
    scale = weight.abs().max() / 448
    rounded = to_float8(weight, scale)
    tensors = {"weight": rounded, "weight_scale": scale, "input_scale": torch.tensor(1.0)}
    return tensors, rounded.float() * scale


def fp8_per_row(module, weight):
    if module == "lm_head":
        return None
    scale = weight.abs().amax(1, keepdim=True) / 448
    rounded = to_float8(weight, scale)
    return {"weight": rounded, "weight_scale": scale}, rounded.float() * scale


def fp8_per_block(module, weight, rows=48, columns=32):
    if module == "lm_head":
        return None
    scale = torch.empty(-(-weight.shape[0] // rows), weight.shape[1] // columns)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scale[i, j] = block.abs().max() / 448
    full = scale.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)
    rounded = to_float8(weight, full)
    return {"weight": rounded, "weight_scale_inv": scale}, rounded.float() * full


def bitsandbytes_4bit(kind: str, is_nested: bool = False):
    def quantise(module, weight):
        if module == "lm_head" or "v_proj" in module:
            return None
        packed, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=is_nested)
        stands_for = bnb.dequantize_4bit(packed, state)
        settings = {f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}
        return {"weight": packed, **settings}, stands_for

    return quantise


def bitsandbytes_int8(module, weight):
    if module == "lm_head":
        return None
    values, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    tensors = {"weight": values, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, values.float() * scales[:, None] / 127


def compressed_integers(
    bits: int, group_size: int | None, symmetric: bool = True, has_order: bool = False
):
    """group_size None: a scale for each row."""

    def quantise(module, weight):
        if module == "lm_head":
            return None
        num_inputs = weight.shape[1]
        order = torch.arange(num_inputs)
        if has_order:
            order = torch.randperm(num_inputs, generator=torch.Generator().manual_seed(3))
        size = group_size or num_inputs
        values, scales, zeros = round_to_groups(weight[:, order], size, bits, symmetric)
        stands_for, in_place = torch.empty_like(weight), torch.empty_like(values)
        stands_for[:, order] = dequantise_groups(values, scales, zeros)
        in_place[:, order] = values
        half = 2 ** (bits - 1)
        tensors = {
            "weight_packed": pack_to_int32((in_place - half).to(torch.int8), bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            zeros = (zeros - half).to(torch.int8)
            tensors["weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0)
        if has_order:
            groups = torch.empty(num_inputs, dtype=torch.int32)
            groups[order] = torch.arange(num_inputs, dtype=torch.int32) // size
            tensors["weight_g_idx"] = groups
        return tensors, stands_for

    return quantise


def int8_per_row(module, weight):
    if module == "lm_head":
        return None
    values, scales, zeros = round_to_groups(weight, weight.shape[1], 8, symmetric=True)
    tensors = {"weight": (values - 128).to(torch.int8), "weight_scale": scales}
    return tensors, dequantise_groups(values, scales, zeros)
