"""Token sequences that an output must not have, looked up by what the output ends with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class BadWords:
    """Any number of sequences: a look-up costs as many steps as they have lengths."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        """Each sequence has one token at least."""
        last_tokens: dict[int, dict[bytes, set[int]]] = {}
        for sequence in sequences:
            beginning = np.array(sequence[:-1], np.int32)
            by_beginning = last_tokens.setdefault(len(beginning), {})
            by_beginning.setdefault(beginning.tobytes(), set()).add(sequence[-1])
        # The last tokens, by the bytes of those before them, by how many these are.
        self._last_tokens = {
            length: {key: np.array(sorted(tokens), np.int64) for key, tokens in found.items()}
            for length, found in last_tokens.items()
        }

    @property
    def needs_output(self) -> bool:
        """Whether what may come next depends on the tokens before."""
        return any(self._last_tokens)

    def next_tokens(self, output: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int64]]:
        """What would complete a sequence after this output [N], in parts."""
        found = []
        for length, last_tokens in self._last_tokens.items():
            if length <= len(output):
                tokens = last_tokens.get(output[len(output) - length :].tobytes())
                if tokens is not None:
                    found.append(tokens)
        return found
