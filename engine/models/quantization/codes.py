"""What the stored bits of a weight stand for, before it is scaled."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False, slots=True)
class Code:
    """Compared by identity."""

    name: str
    bits: int
    """4 or 8."""
    table: torch.Tensor  # float32 [2 ** bits], on the CPU


def _bitsandbytes_4bit(*positive: float) -> torch.Tensor:
    return torch.tensor([*positive, *(-x for x in positive)])


INT4 = Code("int4", 4, torch.arange(-8.0, 8.0))
INT8 = Code("int8", 8, torch.arange(-128.0, 128.0))
FLOAT8 = Code("float8", 8, torch.arange(256).byte().view(torch.float8_e4m3fn).float())
# Quantiles of a normal distribution: Dettmers et al., arXiv 2305.14314, appendix E.
NF4 = Code("nf4", 4, torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]))  # fmt: skip
# A sign, 2 bits of exponent and 1 of mantissa; bitsandbytes' order.
FP4 = Code("fp4", 4, _bitsandbytes_4bit(
    0.0, 0.0052083333333333, 0.6666666666666666, 1.0,
    0.3333333333333333, 0.5, 0.1666666666666667, 0.25,
))  # fmt: skip
