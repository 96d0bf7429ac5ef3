"""The real server, and engine process, around a fake core. A script with the flags of
`loraplex serve`, and --core, which names one of fake_core's factories."""

from __future__ import annotations

import argparse
import logging

from fakes import ByteTokenizer

from loraplex.engine.async_engine import AsyncEngine
from loraplex.engine.core_process import LOG_FORMAT
from loraplex.entrypoints.config_arguments import (
    config_from_arguments,
    engine_config_from_arguments,
)
from loraplex.entrypoints.http.server_config import ServerConfig
from loraplex.entrypoints.serve import add_serve_arguments
from loraplex.entrypoints.server import run_server


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--core", default="make_core")
    add_serve_arguments(parser)
    arguments = parser.parse_args()
    server_config = config_from_arguments(arguments, ServerConfig)
    logging.basicConfig(level=server_config.log_level.upper(), format=LOG_FORMAT)
    engine_config = engine_config_from_arguments(arguments)
    engine = AsyncEngine(engine_config, f"fake_core:{arguments.core}", ByteTokenizer())
    run_server(engine, server_config)


if __name__ == "__main__":
    main()
