from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraplex import native


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        reason = "this machine has no CUDA device"
    elif not native.has_cuda():
        reason = "this build has no CUDA kernels"
    else:
        return
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason=reason))
