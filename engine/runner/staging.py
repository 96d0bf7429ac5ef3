"""A step's arrays on their way to a CUDA device, in one copy from pinned memory to fixed places."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

ALIGNMENT = 16
TORCH_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


class StagingBuffer:
    """Named one-dimensional arrays, each at its place in one buffer on both sides."""

    def __init__(self, fields: Mapping[str, tuple[type, int]], device: torch.device) -> None:
        """fields: dtype and largest size of each array."""
        begins, end = {}, 0
        for name, (dtype, size) in fields.items():
            begins[name] = end
            end += -(-np.dtype(dtype).itemsize * size // ALIGNMENT) * ALIGNMENT
        self._host_bytes = torch.zeros(end, dtype=torch.uint8, pin_memory=True)
        self._device_bytes = torch.zeros(end, dtype=torch.uint8, device=device)
        self.host: dict[str, npt.NDArray] = {}
        self.device: dict[str, torch.Tensor] = {}
        for name, (dtype, size) in fields.items():
            part = slice(begins[name], begins[name] + np.dtype(dtype).itemsize * size)
            self.host[name] = self._host_bytes.numpy()[part].view(dtype)
            self.device[name] = self._device_bytes[part].view(TORCH_DTYPES[np.dtype(dtype)])

    def put(self, name: str, values: npt.NDArray) -> None:
        """Set the beginning of an array on the host's side."""
        self.host[name][: len(values)] = values

    def upload(self) -> None:
        """Copy all to the device, on the current stream. The host's side must stay as it is until
        the copy is done."""
        self._device_bytes.copy_(self._host_bytes, non_blocking=True)
