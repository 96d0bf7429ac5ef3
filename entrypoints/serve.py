"""`loraplex serve`: the server's flags, and its start."""

from __future__ import annotations

import argparse
import logging

from loraplex.engine.config import EngineConfig
from loraplex.engine.core_process import LOG_FORMAT
from loraplex.entrypoints.config_arguments import (
    add_config_arguments,
    add_engine_arguments,
    config_from_arguments,
    engine_config_from_arguments,
)
from loraplex.entrypoints.http.server_config import ServerConfig


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=EngineConfig.model,
        help="A local directory, a Hugging Face hub id, or the embedded model (default: "
        "%(default)s).",
    )
    add_config_arguments(parser, ServerConfig, "server")
    add_engine_arguments(parser, leave_out=("model",))


def run_serve(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; 0 then. Raises ValueError, EngineDeadError."""
    server_config = config_from_arguments(arguments, ServerConfig)
    engine_config = engine_config_from_arguments(arguments)
    logging.basicConfig(level=server_config.log_level.upper(), format=LOG_FORMAT)
    # Imported late, so that --help and a mistake in a flag take no second.
    from loraplex.engine.async_engine import AsyncEngine
    from loraplex.entrypoints.server import run_server

    run_server(AsyncEngine(engine_config), server_config)
    return 0
