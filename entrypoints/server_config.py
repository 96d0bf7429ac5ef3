"""Every setting of the HTTP server, once, as engine.config has the engine's."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from loraplex.engine.config import option

API_KEY_VARIABLE = "LORAPLEX_API_KEY"
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of one server. Raises ValueError for a value that is not allowed."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 is every one of this machine.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    api_key: str | None = option(
        None,
        "Key that clients must give as a bearer token on /v1 routes; default: the environment's "
        f"{API_KEY_VARIABLE}, which other users of the machine can't see.",
    )
    served_model_name: list[str] | None = option(
        None, "Names of the base model in requests; default: the hub id or the directory's name."
    )
    lora_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Adapters to serve; requests choose them by name.",
            "metavar": "NAME=PATH",
        },
    )
    allow_runtime_lora: str | None = field(
        default=None,
        metadata={
            "help": "Let clients add and remove adapters that lie below this directory, through "
            "/v1/load_lora_adapter and /v1/unload_lora_adapter.",
            "metavar": "DIRECTORY",
        },
    )
    shutdown_grace: float = option(
        30.0, "Seconds that running requests are given after SIGTERM or SIGINT."
    )
    log_level: str = option("info", "One of debug, info, warning and error.")

    def __post_init__(self) -> None:
        checks = [
            ("port", 0 <= self.port < 65536, "0 to 65535"),
            ("api_key", self.api_key is None or self.api_key.isascii() and self.api_key != "",
             "a non-empty ASCII string"),
            ("shutdown_grace", 0 <= self.shutdown_grace < math.inf, "0 or more seconds"),
            ("log_level", self.log_level in LOG_LEVELS, f"one of {', '.join(LOG_LEVELS)}"),
            ("allow_runtime_lora", self.runtime_lora_directory is None
             or self.runtime_lora_directory.is_dir(), "a directory"),
        ]  # fmt: skip
        for name, is_allowed, allowed in checks:
            if not is_allowed:
                value = "..." if name == "api_key" else repr(getattr(self, name))
                raise ValueError(f"{name}={value} is not allowed: it must be {allowed}")
        self.adapter_paths()

    def effective_api_key(self) -> str | None:
        return self.api_key or os.environ.get(API_KEY_VARIABLE) or None

    @property
    def runtime_lora_directory(self) -> Path | None:
        """allow_runtime_lora without symbolic links, as the adapters' paths are compared."""
        if self.allow_runtime_lora is None:
            return None
        return Path(self.allow_runtime_lora).expanduser().resolve()

    def adapter_paths(self) -> list[tuple[str, str]]:
        """The names and paths in lora_modules."""
        pairs = []
        for module in self.lora_modules or []:
            name, separator, path = module.partition("=")
            if not (separator and name and path):
                raise ValueError(f"lora_modules={module!r} is not allowed: it must be name=path")
            pairs.append((name, path))
        return pairs
