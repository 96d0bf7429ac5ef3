"""Whether the packages that are installed are those that this engine is made for. No torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

logger = logging.getLogger(__name__)


def unsuitable_packages() -> Iterator[str]:
    """What is wrong with each package whose version is none that we declare."""
    with suppress(PackageNotFoundError):  # that we are run from a tree, and declare nothing
        for text in requires("loraplex") or ():
            requirement = Requirement(text)
            if requirement.marker is not None:  # of an extra
                continue
            found = version(requirement.name)
            if not requirement.specifier.contains(found, prereleases=True):
                yield f"{requirement.name} {found} is installed, and it must be {requirement}"


def warn_of_unsuitable_packages() -> None:
    """Not an error: most of the engine may work. Called when an engine starts."""
    for problem in unsuitable_packages():
        logger.warning("%s: results may be wrong, or models fail to load", problem)
