"""An adapter's form: its settings, and what its tensors are called, how they are shaped and where
they go in the base model. Reads no tensor's data.

Adapters of one kind differ in nothing else, so that who loads many needs to work it out once.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from loraplex.lora.fusion import Part, locate
from loraplex.lora.peft_config import CONFIG_FILE, WEIGHTS_FILE, PeftConfig, read_peft_config
from loraplex.lora.peft_file import TargetedModule, open_weights, read_targeted_modules
from loraplex.lora.spec import BaseModelSpec

MAX_FORMS = 64
# Of one that is kept; longer ones are of adapters whose data takes far longer to read.
MAX_KEPT_BYTES = 1 << 20
# That safetensors takes.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class AdapterForm:
    config: PeftConfig
    parts: list[Part]
    """Of all modules but embedding and head."""
    ends: list[TargetedModule]
    """Those two, if they are targeted."""
    entries: Mapping[str, Any]
    """Of the weights file's header: dtype, shape and place of each tensor's data."""
    data_bytes: int
    """Of all tensors; they follow the header."""

    @classmethod
    def read(cls, directory: Path, spec: BaseModelSpec) -> AdapterForm:
        """Raises AdapterError if any part of the adapter cannot be served."""
        config = read_peft_config(directory)
        with open_weights(directory) as file:
            modules = read_targeted_modules(file, config)
        with (directory / WEIGHTS_FILE).open("rb") as file:
            entries = json.loads(read_header(file))
        entries.pop("__metadata__", None)
        end_names = [end.path for end in (spec.embedding, spec.head) if end is not None]
        return cls(
            config,
            locate([module for module in modules if module.name not in end_names], spec),
            [module for module in modules if module.name in end_names],
            entries,
            max(entry["data_offsets"][1] for entry in entries.values()),
        )


class AdapterForms:
    """Forms of adapters for one base model; keeps those of the last kinds. Thread-safe."""

    def __init__(self, spec: BaseModelSpec) -> None:
        self._spec = spec
        self._forms: OrderedDict[tuple[bytes, bytes], AdapterForm] = OrderedDict()
        self._lock = Lock()

    def read(self, directory: Path) -> AdapterForm:
        """As AdapterForm.read does."""
        try:
            settings = (directory / CONFIG_FILE).read_bytes()
            with (directory / WEIGHTS_FILE).open("rb") as file:
                header = read_header(file)
                num_bytes = file.seek(0, 2)
        except OSError:
            return AdapterForm.read(directory, self._spec)  # which says what is wrong
        key = settings, header
        with self._lock:
            form = self._forms.get(key)
            if form is not None:
                self._forms.move_to_end(key)
        # A file of another size is broken.
        if form is None or num_bytes != 8 + len(header) + form.data_bytes:
            form = AdapterForm.read(directory, self._spec)
            if len(settings) + len(header) <= MAX_KEPT_BYTES:
                self._keep(key, form)
        return form

    def _keep(self, key: tuple[bytes, bytes], form: AdapterForm) -> None:
        with self._lock:
            self._forms[key] = form
            if len(self._forms) > MAX_FORMS:
                self._forms.popitem(last=False)


def read_header(file: BinaryIO) -> bytes:
    """The header, in JSON, of a file in safetensors' format: its size in 8 bytes, the header, the
    data. What is there of it, if the file is broken."""
    size = int.from_bytes(file.read(8), "little")
    return file.read(size) if size <= MAX_HEADER_BYTES else b""
