"""`loraplex generate`: text on the terminal, without a server."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from typing import TextIO

from loraplex.engine.config import EngineConfig
from loraplex.engine.core_process import LOG_FORMAT
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.sampling_params import SamplingParams
from loraplex.entrypoints.config_arguments import (
    add_engine_arguments,
    engine_config_from_arguments,
)

SAMPLING_FLAGS = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty")


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("request")
    group.add_argument(
        "--prompt",
        action="append",
        help="What to continue; may be given several times. Default: standard input.",
    )
    group.add_argument(
        "--chat",
        action="store_true",
        help="Take the prompt as a user's message, in the model's chat template.",
    )
    group.add_argument(
        "--adapter",
        metavar="PATH",
        help="Adapter to apply: a directory, hub:owner/name or s3://bucket/prefix.",
    )
    group.add_argument("--max-tokens", type=int, default=128, help="Default: %(default)s.")
    group.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy.")
    group.add_argument("--top-p", type=float, default=1.0, help="Default: %(default)s, all.")
    group.add_argument("--top-k", type=int, default=0, help="Default: %(default)s, all.")
    group.add_argument("--repetition-penalty", type=float, default=1.0, help="Default: none.")
    group.add_argument("--stop", nargs="+", default=(), help="Strings that end the text.")
    # The engine's seed is also where this one request draws its own from.
    add_engine_arguments(parser)


def run_generate(arguments: argparse.Namespace) -> int:
    """Write what follows the prompts to standard output, one as it comes, several in order.

    Raises ValueError, EngineDeadError.
    """
    config = engine_config_from_arguments(arguments)
    sampling = {name: getattr(arguments, name) for name in SAMPLING_FLAGS}
    params = SamplingParams(stop=tuple(arguments.stop), **sampling)
    lora_request = LoRARequest("adapter", arguments.adapter) if arguments.adapter else None
    prompts = arguments.prompt or [_read_prompt()]
    if not all(prompts):
        raise ValueError(
            "prompt='' is not allowed: give --prompt TEXT, or a text on standard input"
        )
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
    asyncio.run(_generate(config, prompts, params, lora_request, arguments.chat))
    return 0


def _read_prompt() -> str:
    if sys.stdin.isatty():
        sys.stderr.write("Type the prompt; Ctrl-D on a line of its own ends it.\n")
    return sys.stdin.read()


async def _generate(
    config: EngineConfig,
    prompts: list[str],
    params: SamplingParams,
    lora_request: LoRARequest | None,
    is_chat: bool,
) -> None:
    from loraplex.engine.async_engine import AsyncEngine

    engine = AsyncEngine(config)

    async def follow(text: str, out: TextIO | None) -> str:
        """All that follows the prompt; to `out` as it comes."""
        prompt: str | list[int] = text
        if is_chat:
            assert engine.tokenizer is not None
            prompt = engine.tokenizer.apply_chat_template([{"role": "user", "content": text}])
        written = ""
        async for output in engine.generate(prompt, params, lora_request=lora_request):
            so_far = output.outputs[0].text
            if out is not None:
                out.write(so_far[len(written) :])
                out.flush()
            written = so_far
        return written

    try:
        await engine.start()
        out = sys.stdout if len(prompts) == 1 else None
        texts = await asyncio.gather(*(follow(prompt, out) for prompt in prompts))
    finally:
        await engine.shutdown()
    sys.stdout.write("\n" if out else "".join(f"{text}\n" for text in texts))
