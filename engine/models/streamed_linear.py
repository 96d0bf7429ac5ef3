"""Products of few rows with a weight on Hopper GPUs, at the speed of reading the weight.

More rows go to cuBLAS, which is bound by arithmetic there. Knows no models.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from loraplex import native

Tensor = torch.Tensor

# From here on cuBLAS is as fast (docs/performance.md).
MAX_ROWS = 64
# Of native.cuda_linear's scratch, by multiprocessor.
LINEAR_SUMS, LINEAR_FLAGS = 128 * MAX_ROWS, 2


class StreamedLinear:
    """F.linear for weights on one GPU. Its products must follow one another in a stream: they share
    the memory in which multiprocessors hand sums to each other."""

    def __init__(self, device: torch.device) -> None:
        num_blocks = torch.cuda.get_device_properties(device).multi_processor_count
        self._scratch = native.CudaScratch.on(device, num_blocks, LINEAR_SUMS, (LINEAR_FLAGS,))

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Semantics: F.linear(x, weight, bias), summed in float32 and rounded once. What a row
        gives does not depend on the others, but on whether they are more than MAX_ROWS."""
        if x.shape[0] > MAX_ROWS:
            return F.linear(x, weight, bias)
        y = x.new_empty(x.shape[0], weight.shape[0])
        native.cuda_linear(y, x, weight, bias, self._scratch.partials, self._scratch.flags)
        return y


@cache
def _of_device(device: torch.device) -> StreamedLinear:
    return StreamedLinear(device)


def streamed_linear(weight: Tensor) -> StreamedLinear | None:
    """What multiplies by this weight, None where it is not served."""
    is_served = (
        weight.device.type == "cuda"
        and weight.dtype == torch.bfloat16
        and native.has_cuda()
        and torch.cuda.get_device_capability(weight.device) == (9, 0)
        and all(size % 8 == 0 for size in weight.shape)
    )
    return _of_device(weight.device) if is_served else None
