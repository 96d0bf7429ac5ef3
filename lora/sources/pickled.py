"""Turns pickled weights into safetensors, where the operator allows pickled weights at all."""

from __future__ import annotations

from pathlib import Path

from loraplex.lora.peft_config import WEIGHTS_FILE
from loraplex.lora.sources.listing import PICKLED_FILE
from loraplex.lora.spec import AdapterError


def convert_pickled(directory: Path) -> None:
    """Replace adapter_model.bin by adapter_model.safetensors, with torch's restricted unpickler.

    Raises AdapterError if the file is not a dictionary of tensors.
    """
    import torch
    from safetensors.torch import save_file

    path = directory / PICKLED_FILE
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Whatever a broken or hostile file makes the unpickler raise.
        raise AdapterError(
            f"{PICKLED_FILE} is not a file of tensors alone ({type(error).__name__})"
        ) from None
    is_valid = isinstance(tensors, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in tensors.items()
    )
    if not is_valid:
        raise AdapterError(f"{PICKLED_FILE} is not a dictionary of tensors")
    # Safetensors takes no tensors that share memory.
    copies = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    temporary = path.with_suffix(".converted")
    save_file(copies, temporary, metadata={"format": "pt"})
    temporary.rename(directory / WEIGHTS_FILE)
    path.unlink()
