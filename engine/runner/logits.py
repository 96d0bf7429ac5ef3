"""Rows of logits, on any device: parts of them, their largest, and what goes with them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

Int64Array = npt.NDArray[np.int64]

# Logits worked on at a time. On the CPU, temporaries of more than some MB come from the operating
# system anew each time, which costs several times the arithmetic.
CPU_CHUNK_ELEMENTS = 1 << 19
CHUNK_ELEMENTS = 1 << 26

# To find the largest elements of a row, maxima over so many stripes of it come first.
NUM_STRIPES = 16


def chunks(rows: Int64Array, logits: torch.Tensor) -> Iterator[Int64Array]:
    """The rows in parts whose logits are not too many to work on at a time."""
    most = CPU_CHUNK_ELEMENTS if logits.device.type == "cpu" else CHUNK_ELEMENTS
    step = max(1, most // logits.shape[1])
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def take(tensor: torch.Tensor, rows: Int64Array) -> torch.Tensor:
    """These rows, ascending, of a tensor; a view if they are side by side."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return tensor[rows[0] : rows[-1] + 1]
    return tensor[to_device_of(tensor, rows)]


def to_device_of(tensor: torch.Tensor, array: npt.NDArray) -> torch.Tensor:
    """The array on the tensor's device, without waiting for what that does."""
    copied = torch.from_numpy(array)
    if tensor.device.type == "cuda":
        # A copy from memory that may be paged out waits for all that the device was given before.
        copied = copied.pin_memory()
    return copied.to(tensor.device, non_blocking=True)


def column(parameter: npt.NDArray, rows: Int64Array, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter of these rows as a column, [N, 1], on the tensor's device."""
    return to_device_of(tensor, parameter[rows])[:, None]


def largest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The count largest values of each row, ranked: values, token ids and whether the rank is
    sure, [N, count] each. It is not for those that equal the last, since others may be missing."""
    vocab_size = logits.shape[1]
    if vocab_size % NUM_STRIPES or 2 * NUM_STRIPES * count > vocab_size:
        values, token_ids = logits.topk(count, sorted=False)
    else:
        # Columns of stripes: the largest elements are in those with the largest maxima.
        width = vocab_size // NUM_STRIPES
        stripes = logits.unflatten(1, (NUM_STRIPES, width))
        columns = stripes.amax(1).topk(count, sorted=False).indices
        starts = torch.arange(0, vocab_size, width, device=logits.device)
        token_ids = (starts[:, None] + columns[:, None, :]).flatten(1)
        values, index = logits.gather(1, token_ids).topk(count, sorted=False)
        token_ids = token_ids.gather(1, index)
    # One integer that is ordered like (value, -token_id): a float's bits are, but for the sign
    # (and for -0, to which adding 0 gives 0).
    bits = (values.float() + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    order = ((ordered << 32) - token_ids).argsort(descending=True)
    values, token_ids = values.gather(1, order), token_ids.gather(1, order)
    is_sure = values > values[:, -1:] if count < vocab_size else torch.ones_like(values).bool()
    return values, token_ids, is_sure
