"""What an adapter is called: text as users write it, parsed into one canonical form."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from loraplex.lora.spec import AdapterError

SourceName = Literal["hub", "file", "s3"]

SCHEMES: dict[str, SourceName] = {"hub": "hub", "file": "file", "s3": "s3"}
# LoRAX's names. Its "pbase" is refused by name.
ADAPTER_SOURCES: dict[str, SourceName] = {"hub": "hub", "local": "file", "s3": "s3"}
DEFAULT_REVISION = "main"
MAX_LENGTH = 1024

FORMS = (
    "hub:owner/name[@revision][/subfolder], file:/a/directory, s3://bucket/prefix, or without a "
    "scheme an existing directory or a hub id"
)
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)")
HUB = re.compile(
    r"(?P<location>[^/@]+(?:/[^/@]+)?)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?"
    r"(?:/(?P<subfolder>[^@]+))?"
)
HUB_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
# What git allows in a reference's name.
REVISION = re.compile(r"[^\s~^:?*\[\\]+")
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")


@dataclass(frozen=True)
class AdapterReference:
    """Names an adapter's files, as `parse_adapter_reference` understood them.

    Equal references name the same files. `str` gives the canonical text, which parses to an equal
    reference.
    """

    source: SourceName
    location: str
    """hub: "owner/name"; file: an absolute path, whose symlinks are followed when it is fetched;
    s3: "bucket/prefix"."""
    revision: str | None = None
    """hub: a branch, tag or commit; the other sources have none."""
    subfolder: str = ""
    """hub: the folder of the repository that holds the adapter; "" is its top."""

    def __str__(self) -> str:
        match self.source:
            case "file":
                return f"file:{self.location}"
            case "s3":
                return f"s3://{self.location}"
        text = f"hub:{self.location}"
        if self.revision not in (None, DEFAULT_REVISION):
            text += "@" + self.revision.replace("%", "%25").replace("/", "%2F")
        return f"{text}/{self.subfolder}" if self.subfolder else text


def parse_adapter_reference(text: str, adapter_source: str | None = None) -> AdapterReference:
    """The reference that a user's text means.

    A scheme picks the source: `hub:`, `file:` or `s3:`, with or without `//` behind it. Without a
    scheme adapter_source does (LoRAX's: hub, local, s3); without both, text that is an existing
    directory, or that begins with `/`, `./`, `../` or `~`, is a directory, and all else with `/` or
    `@` is a hub id. So a directory wins over a hub id of the same name: write `hub:` for the other.

    Of a hub id the first two parts are the repository, what follows is the subfolder (one part, if
    `@` follows it, is a repository without an owner). Slashes in a revision are written `%2F`;
    `refs/pr/1` is understood as it is. No revision means `main`. A relative path is relative to
    the working directory.

    Raises AdapterError naming the text and what is allowed.
    """
    if not text or len(text) > MAX_LENGTH or not text.isprintable():
        shown = text if len(text) <= MAX_LENGTH else text[:100] + "..."
        raise AdapterError(
            f"adapter {shown!r} is not allowed: it must be 1 to {MAX_LENGTH} printable characters"
        )
    wanted = None if adapter_source is None else _source_of(adapter_source)
    match = SCHEME.fullmatch(text)
    source = SCHEMES.get(match[1].lower()) if match else None
    if match and source:
        if wanted not in (None, source):
            raise AdapterError(
                f"adapter {text!r} is not allowed with adapter_source={adapter_source!r}: its "
                f"scheme says {match[1]!r}; leave one of them out"
            )
        rest = match[2]
    else:
        source, rest = wanted or _guess_source(text), text
    match source:
        case "hub":
            return _parse_hub(text, rest.removeprefix("//"))
        case "s3":
            return _parse_s3(text, rest.removeprefix("//"))
    return _parse_file(text, rest)


def _source_of(adapter_source: str) -> SourceName:
    name = adapter_source.lower()
    if name == "pbase":
        raise AdapterError(
            "adapter_source='pbase' is not served: it is a paid service's store; download the "
            f"adapter and serve it from one of {', '.join(map(repr, ADAPTER_SOURCES))}"
        )
    if name not in ADAPTER_SOURCES:
        raise AdapterError(
            f"adapter_source={adapter_source!r} is not allowed: it must be one of "
            f"{', '.join(map(repr, ADAPTER_SOURCES))}"
        )
    return ADAPTER_SOURCES[name]


def _guess_source(text: str) -> SourceName:
    if text.startswith(("/", "./", "../", "~")) or text in (".", "..") or os.path.isdir(text):
        return "file"
    if SCHEME.fullmatch(text):
        raise AdapterError(
            f"adapter {text!r} is not allowed: its scheme must be one of "
            f"{', '.join(SCHEMES)}, as in {FORMS}"
        )
    if not re.search("[/@]", text):
        raise AdapterError(
            f"adapter {text!r} is not allowed: there is no such directory, and a hub id has an "
            f"owner: allowed are {FORMS}"
        )
    return "hub"


def _parse_hub(text: str, rest: str) -> AdapterReference:
    match = HUB.fullmatch(rest)
    if match is None or not all(HUB_NAME.fullmatch(n) for n in match["location"].split("/")):
        raise AdapterError(f"adapter {text!r} is not a hub id: allowed are {FORMS}")
    revision = match["revision"] or DEFAULT_REVISION
    revision = re.sub("%(2[fF]|25)", lambda m: "%" if m[1] == "25" else "/", revision)
    if not REVISION.fullmatch(revision) or ".." in revision:
        raise AdapterError(
            f"adapter {text!r} is not allowed: {revision!r} is no branch, tag or commit"
        )
    parts = [part for part in (match["subfolder"] or "").split("/") if part]
    if "." in parts or ".." in parts:
        raise AdapterError(f"adapter {text!r} is not allowed: its subfolder has '.' or '..'")
    return AdapterReference("hub", match["location"], revision, "/".join(parts))


def _parse_s3(text: str, rest: str) -> AdapterReference:
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    if not BUCKET.fullmatch(bucket) or not prefix:
        raise AdapterError(
            f"adapter {text!r} is not allowed: it must be s3://bucket/prefix, where the prefix is "
            "the folder that holds adapter_config.json"
        )
    return AdapterReference("s3", f"{bucket}/{prefix}")


def _parse_file(text: str, rest: str) -> AdapterReference:
    if rest != text and rest.startswith("//") and not rest.startswith("///"):
        raise AdapterError(
            f"adapter {text!r} is not allowed: file: takes no host, as in file:/a/directory"
        )
    if not rest:
        raise AdapterError(f"adapter {text!r} is not allowed: allowed are {FORMS}")
    # A path that begins with two slashes would keep them.
    path = os.path.abspath(re.sub("^/+", "/", os.path.expanduser(rest)))
    return AdapterReference("file", path)
