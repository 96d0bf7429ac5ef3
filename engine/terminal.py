"""A program's terminal: it shows how far the requests are, and Ctrl-C may come from it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tqdm import tqdm

from loraplex.engine.outputs import RequestOutput


class ProgressBar(tqdm):
    """Counts finished requests, and shows the rate of their output tokens."""

    num_output_tokens = 0

    def add(self, outputs: list[RequestOutput]) -> None:
        if self.disable:
            return
        self.num_output_tokens += sum(len(c.token_ids) for o in outputs for c in o.outputs)
        rate = self.num_output_tokens / max(self.format_dict["elapsed"], 1e-6)
        self.set_postfix_str(f"{rate:.1f} output tokens/s", refresh=False)
        self.update(len(outputs))


@contextmanager
def interrupts_between_steps() -> Iterator[Callable[[], None]]:
    """Ctrl-C tears no step apart: it raises KeyboardInterrupt where the function that this gives is
    called. A second one raises at once. A handler of the program's own is left alone."""
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_default or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    is_interrupted = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal is_interrupted
        if is_interrupted:
            raise KeyboardInterrupt
        is_interrupted = True

    def check() -> None:
        if is_interrupted:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
