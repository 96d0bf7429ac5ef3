"""Every setting of the places that adapters come from, once: type, default and help."""

from __future__ import annotations

import os
from dataclasses import dataclass

from loraplex.lora.options import check_option, check_types, option

GIB = 1 << 30
HUB_TOKEN_VARIABLE = "LORAPLEX_HUB_TOKEN"


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """Where adapters may come from, and at what price. Raises ValueError for a bad value."""

    adapter_cache_directory: str | None = option(
        None,
        "Directory for adapters that were downloaded, which several engines may share; default: "
        "adapters in Loraplex's cache.",
    )
    adapter_cache_bytes: int = option(
        64 * GIB, "Bytes of downloaded adapters on disk; what was used least recently goes first."
    )
    adapter_roots: list[str] | None = option(
        None,
        "Directories below which local adapters must be. Default: any, as for one's own program; "
        "give them where clients choose paths.",
    )
    adapter_s3_roots: list[str] | None = option(
        None, "Below which adapters in S3 must be: bucket or bucket/prefix. Default: any."
    )
    adapter_s3_endpoint_url: str | None = option(
        None, "URL of an S3-compatible store that is not AWS. Default: AWS."
    )
    adapter_hub_endpoint: str | None = option(
        None, "URL of the hub. Default: the environment's HF_ENDPOINT, or https://huggingface.co."
    )
    adapter_hub_token: str | None = option(
        None,
        "Token that reads the hub for requests that bring none of their own: what it may read, "
        f"they may. Default: the environment's {HUB_TOKEN_VARIABLE}, which other users of the "
        "machine can't see.",
        is_secret=True,
    )
    allow_pickled_adapters: bool = option(
        False, "Read adapter_model.bin where an adapter has no safetensors file."
    )
    max_adapter_bytes: int = option(8 * GIB, "Most bytes of one adapter's files to download.")
    adapter_fetch_threads: int = option(64, "Most fetches at a time, of each source.")
    adapter_fetch_seconds: float = option(
        600.0, "Longest that a fetch may take, with all its attempts."
    )
    adapter_stall_seconds: float = option(
        10.0, "Longest wait for a source's connection, or for its next bytes."
    )
    adapter_fetch_attempts: int = option(
        5, "How often a source that does not answer as it should is asked."
    )
    adapter_backoff_seconds: float = option(
        0.5, "Wait before the second attempt; each further one is twice as long."
    )
    adapter_retry_seconds: float = option(
        5.0, "How long a failed adapter's failure is reported without another attempt."
    )
    adapter_authorization_seconds: float = option(
        60.0, "How long a request's token that could read an adapter is not asked for again."
    )

    def __post_init__(self) -> None:
        check_types(self)
        least = {"adapter_cache_bytes": 0, "max_adapter_bytes": 1, "adapter_fetch_threads": 1,
                 "adapter_fetch_seconds": 0.001, "adapter_stall_seconds": 0.001,
                 "adapter_fetch_attempts": 1, "adapter_backoff_seconds": 0,
                 "adapter_retry_seconds": 0, "adapter_authorization_seconds": 0}  # fmt: skip
        for name, minimum in least.items():
            value = getattr(self, name)
            check_option(name, value, value >= minimum, f"{minimum} or more")

    def effective_hub_token(self) -> str | None:
        if self.adapter_hub_token is not None:
            return self.adapter_hub_token or None
        return os.environ.get(HUB_TOKEN_VARIABLE) or None
