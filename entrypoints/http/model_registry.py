"""Which names a client may put into `model`: the base model's and the adapters'."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraplex.engine.errors import RequestError
from loraplex.engine.lora_request import LoRARequest
from loraplex.entrypoints.http.adapter_places import AdapterPlaces
from loraplex.entrypoints.http.errors import ApiError
from loraplex.lora.sources.reference import AdapterReference


class ModelRegistry:
    """The served names. Adapters are only names and references here; the engine fetches and loads
    them when they are used.

    Raises ValueError for an adapter name that is taken.
    """

    def __init__(
        self,
        base_names: Sequence[str],
        base_root: str,
        max_model_len: int,
        adapters: Sequence[LoRARequest] = (),
        places: Sequence[str] = (),
    ) -> None:
        """places: below which clients may name adapters by their source, as in AdapterPlaces."""
        self.places = AdapterPlaces(places)
        self.base_name = base_names[0]
        self._base_names = list(base_names)
        self._base_root = base_root
        self._max_model_len = max_model_len
        self._created = int(time.time())
        self._adapters: dict[str, LoRARequest] = {}
        for adapter in adapters:
            self.add(adapter)

    def resolve(
        self, name: str, adapter_source: str | None = None, token: str | None = None
    ) -> LoRARequest | None:
        """What `model` means: None is the base model, which "" means, too. See find_adapter.

        Raises ApiError 404; where an adapter_source is given as find_adapter does.
        """
        if name in ("", *self._base_names):
            return None
        try:
            return self.find_adapter(name, adapter_source, token, param="model")
        except ValueError as error:
            if adapter_source is not None:
                raise
            raise self.not_found(name, f"it is not among /v1/models, and {error}") from error

    def find_adapter(
        self, text: str, adapter_source: str | None, token: str | None, param: str
    ) -> LoRARequest:
        """The adapter of this name, or from this place, which the token reads if it is the hub's.

        Raises ApiError 404, and as AdapterPlaces.parse and adapter_request do; param: the field.
        """
        if adapter_source is None and text in self._adapters:
            return self._adapters[text]
        if not self.places:
            raise self.not_found(
                text,
                "it is not among /v1/models, and this server was started without "
                "--allow-runtime-lora, which lets clients name adapters by their source",
            )
        # Named by its reference: two ways to write it are one adapter, for keys and metrics, too.
        reference = self.places.parse(text, adapter_source, param)
        return adapter_request(str(reference), reference, token)

    def not_found(self, name: str, reason: str = "it is not among /v1/models") -> ApiError:
        return ApiError(
            404,
            f"the model {name!r} does not exist: {reason}",
            param="model",
            code="model_not_found",
        )

    def adapter(self, name: str) -> LoRARequest:
        """The adapter of this name. Raises ApiError 404."""
        if name not in self._adapters:
            raise ApiError(404, f"the adapter {name!r} does not exist", param="lora_name")
        return self._adapters[name]

    def adapters(self) -> list[LoRARequest]:
        return list(self._adapters.values())

    def serves(self, lora_path: str) -> bool:
        """Whether any name means this adapter."""
        return any(adapter.lora_path == lora_path for adapter in self._adapters.values())

    def check_free(self, name: str) -> None:
        """Raises ValueError for a name that is taken."""
        if name in self._base_names:
            raise ValueError(f"lora_name={name!r} is not allowed: it names the base model")
        if name in self._adapters:
            raise ValueError(f"lora_name={name!r} is not allowed: it has already been loaded")

    def add(self, adapter: LoRARequest) -> None:
        """Serve an adapter from now on."""
        self.check_free(adapter.lora_name)
        self._adapters[adapter.lora_name] = adapter

    def replace(self, adapter: LoRARequest) -> LoRARequest | None:
        """Serve an adapter from now on, instead of another one of its name, if there is one; that
        is returned."""
        old = self._adapters.pop(adapter.lora_name, None)
        self.add(adapter)
        return old

    def remove(self, name: str) -> LoRARequest:
        """Serve the adapter no more. Raises ApiError 404."""
        adapter = self.adapter(name)
        del self._adapters[name]
        return adapter

    def cards(self) -> list[dict[str, Any]]:
        """What /v1/models lists, the base model first."""
        base = [self._card(name, self._base_root, None) for name in self._base_names]
        for card in base:
            card["max_model_len"] = self._max_model_len
        return base + [
            self._card(adapter.lora_name, adapter.lora_path, self.base_name)
            for adapter in self._adapters.values()
        ]

    def card(self, name: str) -> dict[str, Any]:
        """One of the cards. Raises ApiError 404."""
        for card in self.cards():
            if card["id"] == name:
                return card
        raise self.not_found(name)

    def _card(self, name: str, root: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "loraplex",
            "root": root,
            "parent": parent,
        }


def adapter_request(
    name: str, reference: AdapterReference, token: str | None = None
) -> LoRARequest:
    """A request for an adapter. Raises RequestError 404 for a directory that holds none."""
    if reference.source != "file":
        return LoRARequest(name, str(reference), token=token)
    if not (Path(reference.location) / "adapter_config.json").is_file():
        raise RequestError(
            f"lora_path={reference.location!r} of adapter {name!r} is not allowed: it must be a "
            "directory with an adapter_config.json",
            status=404,
        )
    return LoRARequest(name, reference.location)
