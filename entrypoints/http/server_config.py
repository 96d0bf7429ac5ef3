"""Every setting of the HTTP server, once, as engine.config has the engine's."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass, field

from loraplex.entrypoints.http.adapter_places import AdapterPlaces
from loraplex.entrypoints.http.limits import Limits
from loraplex.entrypoints.openai.reasoning_formats import REASONING_FORMATS
from loraplex.entrypoints.openai.tool_formats import TOOL_FORMATS
from loraplex.lora.options import check_option, check_types, option

API_KEY_VARIABLE = "LORAPLEX_API_KEY"
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of one server. Raises ValueError for a value that is not allowed."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 is every one of this machine.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    admin_port: int | None = option(
        None, "Port of their own for /metrics and the administrators' routes; default: none."
    )
    admin_host: str = option("127.0.0.1", "Address for admin_port.")
    api_key: list[str] | None = option(
        None,
        "Keys, one of which clients must give as a bearer token; default: the environment's "
        f"{API_KEY_VARIABLE}, which other users of the machine can't see.",
    )
    api_key_file: str | None = option(
        None, "TOML file of keys with limits of their own; it is read again when it changes."
    )
    cors_origins: list[str] | None = option(
        None, "Web pages' origins whose scripts may call; * is any. Default: none."
    )
    max_request_bytes: int = option(32 << 20, "Largest body of a request.")
    max_completions: int = option(
        Limits.max_completions, "Most completions of a request: its prompts times n."
    )
    max_stop_sequences: int = option(Limits.max_stop_sequences, "Most stop strings of a request.")
    max_output_tokens: int | None = option(
        None, "Most tokens that a completion may ask for; default: what the model's length leaves."
    )
    request_timeout: float | None = option(
        None, "Seconds after which a generation fails; default: as long as it takes."
    )
    client_timeout: float = option(
        60.0, "Seconds after which a client that takes nothing of its answer is dropped."
    )
    served_model_name: list[str] | None = option(
        None, "Names of the base model in requests; default: the hub id or the directory's name."
    )
    lora_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Adapters to serve; requests choose them by name. A path is a directory, "
            "hub:owner/name[@revision][/subfolder] or s3://bucket/prefix.",
            "metavar": "NAME=PATH",
        },
    )
    preload_lora_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of lora_modules to have in the pool before requests are answered.",
            "metavar": "NAME",
        },
    )
    pin_lora_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of lora_modules to have in the pool before requests are answered, and "
            "never to evict.",
            "metavar": "NAME",
        },
    )
    allow_runtime_lora: list[str] | None = field(
        default=None,
        metadata={
            "help": "Let clients name adapters that lie below these in their requests, and add and "
            "remove them: directories, s3://bucket/prefix, hub:owner, or hub for all of the hub.",
            "metavar": "PLACE",
        },
    )
    tool_call_parser: str = option(
        "auto",
        "How the model writes calls of tools: hermes (Qwen, too), llama3_json, mistral, or auto, "
        "which looks at the chat template.",
    )
    reasoning_parser: str = option(
        "auto",
        "How the model sets its reasoning apart: think (<think> tags), mistral ([THINK] tags), "
        "none (its reasoning stays in the content), or auto, which looks at the chat template.",
    )
    trust_request_chat_template: bool = option(
        False,
        "Take chat templates that requests bring. They reach no file and no secret, but may take "
        "any time and memory.",
    )
    shutdown_grace: float = option(
        30.0, "Seconds that running requests are given after SIGTERM or SIGINT."
    )
    otlp_endpoint: str | None = option(
        None,
        "Where spans of requests are sent: an OpenTelemetry collector that speaks OTLP over HTTP.",
    )
    access_log: bool = option(True, "Write a line of JSON to standard output for each request.")
    log_level: str = option("info", "One of debug, info, warning and error.")

    def __post_init__(self) -> None:
        check_types(self)
        checks = [
            ("port", 0 <= self.port < 65536, "0 to 65535"),
            ("api_key", all(key and key.isascii() for key in self.api_key or []),
             "non-empty ASCII strings"),
            ("admin_port", 0 <= (self.admin_port or 0) < 65536, "0 to 65535"),
            ("max_request_bytes", self.max_request_bytes >= 1, "1 or more"),
            ("max_completions", self.max_completions >= 1, "1 or more"),
            ("max_stop_sequences", self.max_stop_sequences >= 0, "0 or more"),
            ("max_output_tokens", (self.max_output_tokens or 1) >= 1, "1 or more"),
            ("request_timeout", 0 < (self.request_timeout or 1) < math.inf, "above 0"),
            ("client_timeout", 0 < self.client_timeout < 1e6, "above 0 and below a million"),
            ("shutdown_grace", 0 <= self.shutdown_grace < math.inf, "0 or more seconds"),
            ("tool_call_parser", self.tool_call_parser in ("auto", *TOOL_FORMATS),
             f"auto or one of {', '.join(TOOL_FORMATS)}"),
            ("reasoning_parser", self.reasoning_parser in ("auto", "none", *REASONING_FORMATS),
             f"auto, none or one of {', '.join(REASONING_FORMATS)}"),
            ("log_level", self.log_level in LOG_LEVELS, f"one of {', '.join(LOG_LEVELS)}"),
        ]  # fmt: skip
        for name, is_allowed, allowed in checks:
            if not is_allowed:
                value = "..." if name == "api_key" else repr(getattr(self, name))
                raise ValueError(f"{name}={value} is not allowed: it must be {allowed}")
        names = [name for name, _ in self.adapter_paths()]
        for name, count in Counter(names).items():
            check_option("lora_modules", name, count == 1, "a name that is given once")
        for option_name in ("preload_lora_modules", "pin_lora_modules"):
            for name in getattr(self, option_name) or ():
                check_option(option_name, name, name in names, "the name of one of lora_modules")
        AdapterPlaces(self.allow_runtime_lora or ())

    def api_keys(self) -> list[str]:
        from_environment = os.environ.get(API_KEY_VARIABLE)
        return self.api_key or ([from_environment] if from_environment else [])

    @property
    def limits(self) -> Limits:
        return Limits(
            max_completions=self.max_completions,
            max_stop_sequences=self.max_stop_sequences,
            max_output_tokens=self.max_output_tokens,
            request_timeout=self.request_timeout,
        )

    def adapter_paths(self) -> list[tuple[str, str]]:
        """The names and paths in lora_modules."""
        pairs = []
        for module in self.lora_modules or []:
            name, separator, path = module.partition("=")
            if not (separator and name and path):
                raise ValueError(f"lora_modules={module!r} is not allowed: it must be name=path")
            pairs.append((name, path))
        return pairs
