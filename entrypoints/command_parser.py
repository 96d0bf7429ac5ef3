"""Parsers of commands, whose mistakes are told in a line, and hint at the flag that was meant."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

MODEL = "the model is named without a flag"
NOT_NEEDED = (
    "leave it out: adapters and KV cache share one page pool, as large as --pool-bytes says"
)
ALWAYS_ON = "leave it out: it is always on"
# What flags of LoRAX and vLLM are called here.
OTHERS_FLAGS = {
    "--model": MODEL,
    "--model-id": MODEL,
    "--adapter-id": "--lora-modules NAME=PATH",
    "--adapter-source": "--allow-runtime-lora PLACE",
    "--preloaded-adapter-ids": "--lora-modules NAME=PATH and --preload-lora-modules NAME",
    "--max-concurrent-requests": "--max-num-waiting",
    "--max-total-tokens": "--max-model-len",
    "--max-input-length": "--max-model-len",
    "--max-batch-prefill-tokens": "--max-num-batched-tokens",
    "--max-batch-total-tokens": NOT_NEEDED,
    "--adapter-memory-fraction": NOT_NEEDED,
    "--max-active-adapters": NOT_NEEDED,
    "--adapter-cycle-time-s": NOT_NEEDED,
    "--num-gpu-blocks-override": NOT_NEEDED,
    "--prefix-caching": ALWAYS_ON,
    "--chunked-prefill": ALWAYS_ON,
    "--enable-auto-tool-choice": ALWAYS_ON,
    "--quantize": "--quantization",
    "--num-shard": "--tensor-parallel-size",
    "--hostname": "--host",
    "--disable-log-requests": "--no-access-log",
    "--uvicorn-log-level": "--log-level",
}


class CommandParser(argparse.ArgumentParser):
    """A parser that does not bury a mistake under all of its flags."""

    def error(self, message: str) -> NoReturn:
        hint = f"`{self.prog} --help` says what there is"
        self.exit(2, f"{self.prog}: {message}\n{hint}\n")

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        namespace, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            self.error(self._explain(unknown))
        return namespace, unknown

    def _explain(self, unknown: list[str]) -> str:
        flags = [argument for argument in unknown if argument.startswith("-")]
        if not flags:
            return f"{unknown[0]!r} is not understood: it is behind no flag that takes it"
        flag = flags[0].partition("=")[0]
        similar = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        hint = OTHERS_FLAGS.get(flag) or (f"did you mean {similar[0]}?" if similar else "")
        return f"{flag} is not a flag" + (f": {hint}" if hint else "")
