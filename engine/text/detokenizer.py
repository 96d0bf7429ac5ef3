"""Tokens to text one token at a time, and the search for stop strings in it.

Knows tokenizers only by their `decode`.
"""

from __future__ import annotations

from collections.abc import Sequence

from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MAX_WINDOW = 16
MAX_BROKEN_WINDOW = 64
MAX_CHARACTER_BYTES = 4


class IncrementalDecoder:
    """Gives the text of a growing list of tokens piece by piece.

    The pieces, with what finish() gives, add up to the decode of all tokens, and no piece ends
    within a character: text that ends in U+FFFD waits, for the next token may complete it.

    Tokens are decoded in a window of the last few, since the text of a token depends on what is
    before it (a character's first bytes, the space that some tokenizers drop at the beginning).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._text = ""  # of the window
        self._num_emitted = 0  # characters of it that are out
        self._num_settled = 0  # tokens of it up to the last that ended with a whole character

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" if it ends within a character."""
        window = self._window
        window.append(token_id)
        text = self._decode(window)
        if text.endswith(REPLACEMENT):
            self._text = text
            whole = max(len(text.rstrip(REPLACEMENT)), self._num_emitted)
            piece = text[self._num_emitted : whole]
            self._num_emitted = whole
            return piece if len(window) <= MAX_BROKEN_WINDOW else piece + self._settle_garbage()
        piece = text[self._num_emitted :]
        if not piece and text == self._text and (text or len(window) > MAX_WINDOW):
            # A special token that is left out tells nothing about the next one's text.
            window.pop()
            return ""
        self._text, self._num_emitted = text, len(text)
        if text and self._num_settled and len(window) > MAX_WINDOW:
            del window[: self._num_settled]
            self._text = self._decode(window)
            self._num_emitted = len(self._text)
        self._num_settled = len(window)
        return piece

    def finish(self) -> str:
        """What was held back; no token comes after."""
        return self._text[self._num_emitted :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)

    def _settle_garbage(self) -> str:
        """Forget the beginning of a long window that never ended with a whole character, so that
        bytes which are no text cost no more than others."""
        window, text = self._window, self._text
        for cut in range(len(window) - 1, len(window) - 1 - MAX_CHARACTER_BYTES, -1):
            head, tail = self._decode(window[:cut]), self._decode(window[cut:])
            if head + tail == text:
                piece = head[self._num_emitted :]
                del window[:cut]
                self._text, self._num_emitted, self._num_settled = tail, 0, 0
                return piece
        return ""


class Detokenizer:
    """The text of one completion while it grows, up to the first stop string.

    Of several stop strings, the one that is complete first ends the text, and of those complete at
    the same character the longest: how the text is cut into tokens makes no difference.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.text = ""
        """All text so far; cut where a stop string ended it."""
        self._decoder = IncrementalDecoder(tokenizer, params.skip_special_tokens)
        self._stop = params.stop
        self._longest_stop = max(map(len, params.stop), default=0)
        self._first_characters = {stop[0] for stop in params.stop}
        self._keeps_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0

    def push(self, token_id: int) -> str | None:
        """Add a token's text. Returns the stop string that this completes."""
        self._num_tokens += 1
        return self._extend(self._decoder.push(token_id))

    def finish(self) -> str | None:
        """Add what waits for the rest of a character, when there is none. Returns as push."""
        return self._extend(self._decoder.finish())

    def visible_text(self) -> str:
        """`text`, less what may turn out to be the beginning of a stop string."""
        if self._keeps_stop:
            return self.text
        for start in range(max(0, len(self.text) - self._longest_stop + 1), len(self.text)):
            if self.text[start] in self._first_characters:
                tail = self.text[start:]
                if any(stop.startswith(tail) for stop in self._stop):
                    return self.text[:start]
        return self.text

    def _extend(self, piece: str) -> str | None:
        num_old = len(self.text)
        self.text += piece
        if not piece or not self._stop or self._num_tokens < self._min_tokens:
            return None
        first: tuple[int, int] | None = None
        for stop in self._stop:
            # The match must end in the new text.
            start = self.text.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0 and (first is None or (start + len(stop), start) < first):
                first = start + len(stop), start
        if first is None:
            return None
        end, start = first
        stop = self.text[start:end]
        self.text = self.text[: end if self._keeps_stop else start]
        return stop
