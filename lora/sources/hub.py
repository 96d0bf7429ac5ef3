"""Adapters in repositories of the Hugging Face Hub, public or private."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from loraplex.lora.sources.listing import (
    Identity,
    Listing,
    Patience,
    SourceFile,
    SourceUnavailable,
)
from loraplex.lora.sources.reference import AdapterReference
from loraplex.lora.spec import AdapterError


class HubSource:
    """Repositories of a hub. The version is the commit.

    Whether a token may read a repository is asked of the hub every time, so that what is in the
    cache serves nobody who may not read it. With HF_HUB_OFFLINE=1 the hub is never asked: what was
    public, or was read with the same token, is found by what the cache remembers.
    """

    def __init__(
        self,
        endpoint: str | None,
        token: str | None,
        recall: Callable[[Identity], Identity | None],
    ) -> None:
        """endpoint: default HF_ENDPOINT's, or huggingface.co. token: for requests without one.

        recall: the identity that was last remembered for an alias.
        """
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._token = token
        self._recall = recall
        self._api = HfApi(endpoint=self._endpoint)

    def find(self, reference: AdapterReference, token: str | None, patience: Patience) -> Listing:
        token = token or self._token or None
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise AdapterError("the token for the hub holds characters that no token has")
        if constants.HF_HUB_OFFLINE:
            return self._find_offline(reference, token)
        with _plain_errors(reference, self._endpoint):
            info = self._api.model_info(
                reference.location,
                revision=reference.revision,
                files_metadata=True,
                timeout=patience.next_timeout(),
                # None would be the token that this machine's user is logged in with.
                token=token or False,
            )
        opener = _Opener(self._endpoint, reference, info.sha, token)
        files = _files(info, reference.subfolder)
        if info.gated and files:
            # Of these everybody sees the listing, and only who is let in may read the files.
            with opener(files[0], 0, patience):
                pass
        is_public = info.private is False and not info.gated
        return Listing(
            ("hub", self._endpoint, reference.location, reference.subfolder, info.sha),
            files,
            opener,
            alias=self._alias(reference, None if is_public else token),
        )

    def _find_offline(self, reference: AdapterReference, token: str | None) -> Listing:
        readers = [None] if token is None else [None, token]
        for reader in readers:
            identity = self._recall(self._alias(reference, reader))
            if identity is not None:
                opener = _Opener(self._endpoint, reference, identity[-1], token)
                return Listing(identity, None, opener)
        raise AdapterError(
            "HF_HUB_OFFLINE is set, and there is no cached copy that this token has read",
            status=404,
        )

    def _alias(self, reference: AdapterReference, token: str | None) -> Identity:
        """Under what a revision is remembered, for all or for those who have the token."""
        reader = "" if token is None else blake2b(token.encode(), digest_size=16).hexdigest()
        return ("alias", self._endpoint, str(reference), reader)


class _Opener:
    """Opens files of one commit."""

    def __init__(
        self, endpoint: str, reference: AdapterReference, commit: str, token: str | None
    ) -> None:
        self._endpoint = endpoint
        self._reference = reference
        self._commit = commit
        self._token = token

    @contextmanager
    def __call__(
        self, file: SourceFile, offset: int, patience: Patience
    ) -> Iterator[tuple[int, Iterator[bytes]]]:
        url = hf_hub_url(
            self._reference.location,
            file.name,
            subfolder=self._reference.subfolder or None,
            revision=self._commit,
            endpoint=self._endpoint,
        )
        # Compressed, a file has no sizes to resume by.
        headers = build_hf_headers(token=self._token or False) | {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with (
            _plain_errors(self._reference, self._endpoint),
            get_session().stream(
                "GET", url, headers=headers, timeout=patience.next_timeout(), follow_redirects=True
            ) as response,
        ):
            hf_raise_for_status(response)
            yield (offset if response.status_code == 206 else 0), response.iter_raw()


def _files(info: Any, subfolder: str) -> list[SourceFile]:
    start = f"{subfolder}/" if subfolder else ""
    files = []
    for sibling in info.siblings or ():
        if sibling.rfilename.startswith(start):
            if sibling.size is None:
                raise SourceUnavailable(f"the hub does not say how large {sibling.rfilename} is")
            sha256 = sibling.lfs.sha256 if sibling.lfs else None
            name = sibling.rfilename.removeprefix(start)
            files.append(SourceFile(name, sibling.size, sha256=sha256))
    return files


@contextmanager
def _plain_errors(reference: AdapterReference, endpoint: str) -> Iterator[None]:
    """The hub's errors as ours; what goes into them is chosen, so that no secret gets there."""
    try:
        yield
    except RevisionNotFoundError:
        raise AdapterError(
            f"the repository has no revision {reference.revision!r}", status=404
        ) from None
    except GatedRepoError:
        raise AdapterError(
            "the repository is gated: give the token of an account that has been let in", status=403
        ) from None
    except DisabledRepoError:
        raise AdapterError("the hub has disabled the repository", status=403) from None
    except EntryNotFoundError:
        raise SourceUnavailable("the repository lacks a file that it lists") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 404):
            raise AdapterError(
                f"{endpoint} has no such repository, or it is private and no token that may read "
                "it was given",
                status=404,
            ) from None
        if status == 403:
            raise AdapterError("the token may not read the repository", status=403) from None
        message = f"{endpoint} answered with HTTP status {status}"
        if status in (408, 429) or status >= 500:
            raise SourceUnavailable(message) from None
        raise AdapterError(message, status=502) from None
    except HTTPError as error:
        name = type(error).__name__
        status = 504 if "Timeout" in name else 502
        raise SourceUnavailable(f"{endpoint} could not be reached ({name})", status) from None
