"""Adapters in S3-compatible object stores, by way of boto3, which the extra `s3` installs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from hashlib import blake2b
from typing import Any

from loraplex.lora.sources.listing import (
    WANTED_FILES,
    Listing,
    Patience,
    SourceFile,
    SourceUnavailable,
)
from loraplex.lora.sources.reference import AdapterReference
from loraplex.lora.spec import AdapterError

PIECE_BYTES = 1 << 16
NOT_FOUND = ("NoSuchBucket", "NoSuchKey", "404")
# The object has another ETag than in the listing, or too much is asked of the store.
TRANSIENT = ("PreconditionFailed", "SlowDown", "RequestTimeout", "Throttling", "TooManyRequests")


class S3Source:
    """Prefixes of buckets, read with the server's own credentials (AWS's usual ones).

    The version is a hash of the files' ETags and sizes. Requests' tokens don't count here: what
    clients may read is what is below the roots.
    """

    def __init__(
        self, endpoint_url: str | None, roots: Sequence[str], stall_seconds: float, num_threads: int
    ) -> None:
        """endpoint_url: of a store that isn't AWS. roots: "bucket" or "bucket/prefix", below which
        adapters may be; none allow any."""
        self._endpoint_url = endpoint_url
        self._roots = [root.removeprefix("s3://").strip("/") + "/" for root in roots]
        self._stall_seconds = stall_seconds
        self._num_threads = num_threads
        self._lock = threading.Lock()
        self._client: Any = None

    def find(self, reference: AdapterReference, token: str | None, patience: Patience) -> Listing:
        location = reference.location + "/"
        if self._roots and not location.startswith(tuple(self._roots)):
            raise AdapterError(
                "it is not below a prefix that this server may read adapters from", status=403
            )
        bucket, _, prefix = location.partition("/")
        files = []
        with self._plain_errors():
            pages = self._get_client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=bucket, Prefix=prefix, Delimiter="/"):
                patience.next_timeout()
                for item in page.get("Contents", ()):
                    name = item["Key"].removeprefix(prefix)
                    if name in WANTED_FILES:
                        files.append(SourceFile(name, item["Size"], etag=item["ETag"]))
        if not files:
            raise AdapterError("there is no adapter below this prefix", status=404)
        marks = sorted(f"{file.name} {file.etag} {file.num_bytes}" for file in files)
        version = blake2b("\n".join(marks).encode(), digest_size=16).hexdigest()

        @contextmanager
        def open_file(
            file: SourceFile, offset: int, patience: Patience
        ) -> Iterator[tuple[int, Iterator[bytes]]]:
            options = {"Range": f"bytes={offset}-"} if offset else {}
            with self._plain_errors():
                response = self._get_client().get_object(
                    Bucket=bucket, Key=prefix + file.name, IfMatch=file.etag, **options
                )
                start = offset if "ContentRange" in response else 0
                with closing(response["Body"]) as body:
                    yield start, body.iter_chunks(PIECE_BYTES)

        return Listing(
            ("s3", self._endpoint_url or "", reference.location, "", version), files, open_file
        )

    def _get_client(self) -> Any:
        """The client: thread-safe, but not while it is made."""
        with self._lock:
            if self._client is None:
                self._client = self._make_client()
            return self._client

    def _make_client(self) -> Any:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config

        session = boto3.Session()
        options: dict[str, Any] = {}
        if session.get_credentials() is None:
            options["signature_version"] = UNSIGNED
        if self._endpoint_url is not None:
            # Few stores but AWS have a host name for every bucket.
            options["s3"] = {"addressing_style": "path"}
        config = Config(
            connect_timeout=self._stall_seconds,
            read_timeout=self._stall_seconds,
            # Attempts are counted where all sources' are.
            retries={"total_max_attempts": 1},
            max_pool_connections=self._num_threads,
            **options,
        )
        return session.client("s3", endpoint_url=self._endpoint_url, config=config)

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """boto3's errors as ours; what goes into them is chosen, so that no secret gets there."""
        try:
            from botocore.exceptions import (
                BotoCoreError,
                ClientError,
                ConnectionError,
                HTTPClientError,
                IncompleteReadError,
            )
        except ModuleNotFoundError:
            raise AdapterError(
                "adapters in S3 need boto3: pip install 'loraplex[s3]'", status=501
            ) from None
        store = self._endpoint_url or "S3"
        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", "?"))
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code in NOT_FOUND or status == 404:
                raise AdapterError(f"{store} has no such object ({code})", status=404) from None
            if code in TRANSIENT or status in (408, 412, 429) or status >= 500:
                raise SourceUnavailable(f"{store} answered with {code} ({status})") from None
            if status in (401, 403):
                raise AdapterError(
                    f"{store} does not let this server read it ({code})", status=403
                ) from None
            raise AdapterError(f"{store} answered with {code} ({status})", status=502) from None
        except (ConnectionError, HTTPClientError, IncompleteReadError) as error:
            name = type(error).__name__
            raise SourceUnavailable(
                f"{store} could not be reached ({name})", 504 if "Timeout" in name else 502
            ) from None
        except BotoCoreError as error:
            raise AdapterError(
                f"{store} could not be asked ({type(error).__name__})", status=502
            ) from None
