"""Finds the request that makes steps fail, so that it alone is refused. No torch.

A step that fails is undone, and the requests that were in it are suspects: one half of them runs
again, then the other, and a half that fails is halved in turn. Who gets its next token, the one
that the failed step would have given it, is a suspect no more. All others wait meanwhile; nobody
loses a token, since a preempted request is computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from loraplex.engine.request import Request, RequestStatus

# So many requests in a row are refused before the device is given up.
MOST_BLAMED = 4


class Isolation:
    """The suspects, in the groups in which they get to run."""

    def __init__(self) -> None:
        self._groups: list[list[Request]] = []
        """The last runs now."""
        self._num_blamed = 0
        """Requests that were refused since a step last went well."""

    def group(self) -> list[Request] | None:
        """The only requests that may begin to run now; None: all may."""
        while self._groups:
            group = self._groups[-1]
            group[:] = [r for r in group if r.status is not RequestStatus.FINISHED]
            if group:
                return group
            self._groups.pop()
        return None

    def take_failure(self, requests: Iterable[Request], error: Exception) -> Request | None:
        """The request to refuse, if the steps with these requests failed because of one that is
        known now. Raises the error where it can't be about requests: one after the other was
        refused, and no step went well."""
        requests = list(dict.fromkeys(requests))
        group = self._groups.pop() if self._groups else requests
        suspects = [r for r in group if r in requests]
        others = [r for r in requests if r not in suspects]
        if others:
            # Some that seemed innocent ran along, and may fail in a later step: the group alone
            # will tell.
            self._groups += [group for group in (others, suspects) if group]
            return None
        if len(suspects) > 1:
            middle = len(suspects) // 2
            self._groups += [suspects[middle:], suspects[:middle]]
            return None
        if self._num_blamed == MOST_BLAMED:
            raise error
        self._num_blamed += 1
        return suspects[0]

    def take_success(self, requests: Collection[Request]) -> None:
        """A step gave these their next tokens."""
        self._num_blamed = 0
        if self._groups:
            group = self._groups[-1]
            group[:] = [r for r in group if r not in requests]
