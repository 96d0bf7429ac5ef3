"""Where clients may name adapters from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from loraplex.engine.errors import RequestError
from loraplex.lora.sources.reference import AdapterReference, parse_adapter_reference

FORMS = "a directory, hub, hub:owner, hub:owner/name or s3://bucket/prefix"


class AdapterPlaces:
    """Directories, prefixes in S3, and the hub or parts of it; what is below one of them may be
    served. Raises ValueError for a place that is none of these.
    """

    def __init__(self, places: Sequence[str]) -> None:
        self._places = list(places)
        self._hub: list[str] = []
        self._s3: list[str] = []
        self._directories: list[Path] = []
        for place in places:
            if place == "hub" or place.startswith("hub:"):
                self._hub.append(place[4:].strip("/"))
            elif place.startswith("s3://"):
                self._s3.append(place[5:].strip("/"))
            else:
                directory = Path(place).expanduser().resolve()
                if not directory.is_dir():
                    raise ValueError(
                        f"allow_runtime_lora={place!r} is not allowed: it must be {FORMS}"
                    )
                self._directories.append(directory)

    def __bool__(self) -> bool:
        return bool(self._places)

    def parse(
        self, text: str, adapter_source: str | None = None, param: str = "lora_path"
    ) -> AdapterReference:
        """The reference that a client's text means, if it may be served.

        Raises RequestError 403 if it may not, naming the request's field, and ValueError for text
        that is no reference.
        """
        reference = parse_adapter_reference(text, adapter_source)
        if not self._is_below(reference):
            raise RequestError(
                f"{param}={text!r} is not allowed: this server loads adapters from below "
                f"{', '.join(self._places) or 'no place'} only (--allow-runtime-lora)",
                status=403,
            )
        return reference

    def _is_below(self, reference: AdapterReference) -> bool:
        location = reference.location
        if reference.source == "file":
            path = Path(os.path.realpath(location))
            return any(path.is_relative_to(directory) for directory in self._directories)
        places = self._hub if reference.source == "hub" else self._s3
        return any(place in ("", location) or location.startswith(place + "/") for place in places)
