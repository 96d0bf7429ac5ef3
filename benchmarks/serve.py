"""Latency of a server under traffic that does not wait for it: open-loop arrivals.

The server is any that speaks OpenAI's completions with token ids as prompts, with adapters as
models; or one that is started for the purpose, with adapters made for it.

    python benchmarks/serve.py --url http://localhost:8000 --rate 4 --duration 60
    python benchmarks/serve.py --shape tiny --num-adapters 4 --rate 20 -- --max-num-seqs 64
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import uvloop

from loraplex.benchmarks import workloads
from loraplex.benchmarks.completion_client import Call, Record, send_all
from loraplex.benchmarks.offline import (
    add_adapter_arguments,
    add_model_arguments,
    read_vocab_size,
    scratch_directory,
)
from loraplex.benchmarks.plots import plot_latencies
from loraplex.benchmarks.results import milliseconds, result_path, write_result
from loraplex.benchmarks.synthetic_model import write_model

START_TIMEOUT = 600.0
STOP_TIMEOUT = 60.0
OWN_ADAPTERS = 16
# Ids that the vocabulary of nearly every model has.
COMMON_VOCAB_SIZE = 32_000


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """0 if at least one request was answered, else 1. ValueError, RuntimeError: see measure."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = make_parser(prog).parse_args(arguments[:split])
    server_flags = arguments[split + 1 :]
    if options.url is not None and server_flags:
        raise ValueError("flags after -- are for a server of its own: leave --url out")
    with ExitStack() as stack:
        if options.url is None:
            server = stack.enter_context(own_server(options, server_flags))
            url, vocab_size = server.url, server.vocab_size
        else:
            url, vocab_size = options.url.rstrip("/").removesuffix("/v1"), COMMON_VOCAB_SIZE
        records, seconds = measure(url, options, options.vocab_size or vocab_size)
    summary = summarize(records, seconds, options.slo_ttft, options.slo_tpot)
    print_summary(summary)
    write(options, server_flags, records, summary)
    return 0 if summary["completed"] else 1


def make_parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        usage="%(prog)s [flags] [-- flags of `loraplex serve`]",
        description="Latency of a server under open-loop traffic: requests come at their times, "
        "whether or not the server has answered those before. Greedy, exact lengths, random token "
        "ids as prompts, one adapter (a model name) for each request.",
    )
    group = parser.add_argument_group("server")
    group.add_argument(
        "--url", help="of a running server, as in http://localhost:8000; without it, one is started"
    )
    add_model_arguments(group)
    group.add_argument(
        "--num-adapters",
        type=int,
        metavar="N",
        help="adapters to draw from; 0 is the base model alone (default: all that a running "
        f"server lists; {OWN_ADAPTERS} for one that is started)",
    )
    group.add_argument(
        "--adapters",
        nargs="+",
        metavar="NAME",
        help="names of adapters at a running server (default: the models it lists with a parent)",
    )
    group.add_argument("--api-key", help="bearer token of a running server")
    add_adapter_arguments(group)
    add_traffic_arguments(parser.add_argument_group("traffic"))
    group = parser.add_argument_group("report")
    group.add_argument(
        "--slo-ttft", type=float, metavar="SECONDS", help="goodput counts requests whose first "
        "token came so soon",
    )  # fmt: skip
    group.add_argument(
        "--slo-tpot", type=float, metavar="SECONDS", help="... and whose later tokens took so "
        "long each at most",
    )  # fmt: skip
    group.add_argument("--output", type=Path, help="JSON file to write; the picture goes beside it")
    group.add_argument(
        "--details", type=Path, help="JSON Lines file for every request with its token times"
    )
    return parser


def add_traffic_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--workload",
        choices=["slora", "chat"],
        default="slora",
        help="slora: independent requests as in S-LoRA's evaluation; chat: conversations of "
        "several turns that begin alike (default: %(default)s)",
    )
    numbers = [
        ("--rate", float, 2.0, "requests (chat: conversations) per second"),
        ("--duration", float, 60.0, "seconds of arrivals"),
        ("--cv", float, 1.0, "burstiness of arrivals: 1 is a Poisson process, more is burstier"),
        ("--alpha", float, 1.0, "popularity of adapters: 1 is uniform, less is more skewed"),
        ("--turns", int, 4, "chat: turns of a conversation"),
        ("--think-time", float, 10.0, "chat: mean seconds between turns"),
        ("--system-len", int, 256, "chat: tokens that all conversations of an adapter begin with"),
        ("--seed", int, 42, "of the workload"),
        ("--timeout", float, 600.0, "seconds after which a request has failed"),
    ]
    for flag, kind, default, text in numbers:
        group.add_argument(
            flag, type=kind, default=default, metavar="X", help=f"{text} (default: %(default)s)"
        )
    for flag, text in [("--input-range", "prompt (chat: a turn)"), ("--output-range", "reply")]:
        group.add_argument(
            flag, type=int, nargs=2, default=[8, 512], metavar=("MIN", "END"),
            help=f"tokens of a {text}, END left out (default: 8 512)",
        )  # fmt: skip
    group.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="prompts are drawn from the ids below (default: the model's size; "
        f"{COMMON_VOCAB_SIZE} for a running server)",
    )


def make_workload(
    options: argparse.Namespace, num_adapters: int, vocab_size: int
) -> list[workloads.WorkloadRequest]:
    """Raises ValueError if no request falls into the duration."""
    settings = {
        **{name: getattr(options, name) for name in ("alpha", "rate", "cv", "duration", "seed")},
        "input_range": tuple(options.input_range),
        "output_range": tuple(options.output_range),
        "vocab_size": vocab_size,
    }
    if options.workload == "chat":
        names = {"num_turns": "turns", "think_time": "think_time", "system_len": "system_len"}
        settings |= {name: getattr(options, flag) for name, flag in names.items()}
    requests = getattr(workloads, options.workload)(num_adapters, **settings)
    if not requests:
        raise ValueError(
            f"--rate {options.rate} --duration {options.duration} is not allowed: their product "
            "is the number of requests, which must be 1 or more"
        )
    return requests


def measure(url: str, options: argparse.Namespace, vocab_size: int) -> tuple[list[Record], float]:
    """Send the workload; a record for each request, and the seconds until all were answered.

    Raises ValueError if the server has not the adapters, RuntimeError if it can't be asked.
    """
    base, adapters = served_models(url, options)
    requests = make_workload(options, len(adapters), vocab_size)
    calls = [
        Call(
            base if request.adapter is None else adapters[request.adapter],
            request.prompt_token_ids,
            request.max_tokens,
            request.arrival_time,
        )
        for request in requests
    ]
    # Every request that waits has a connection.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # What happens once should not be the first requests' burden.
    first = Call(base, calls[0].prompt_token_ids, 2)
    (record,), _ = uvloop.run(send_all(url, [first], options.timeout, options.api_key))
    if record.error is not None:
        raise RuntimeError(f"the server does not answer a first request: {record.error}")
    print(
        f"{len(calls)} requests to {len({call.model for call in calls})} models of {url} within "
        f"{calls[-1].arrival_time:.1f} s",
        flush=True,
    )
    return uvloop.run(send_all(url, calls, options.timeout, options.api_key))


def served_models(url: str, options: argparse.Namespace) -> tuple[str, list[str]]:
    """The base model's name, and those of the adapters to use."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    try:
        response = httpx.get(f"{url}/v1/models", headers=headers, timeout=30)
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise RuntimeError(f"{url}/v1/models: {error}") from error
    cards = response.json()["data"]
    adapters = options.adapters or [card["id"] for card in cards if card.get("parent")]
    wanted = len(adapters) if options.num_adapters is None else options.num_adapters
    if wanted > len(adapters):
        raise ValueError(
            f"--num-adapters {wanted} is not allowed: the server has {len(adapters)} adapters"
        )
    return next(card["id"] for card in cards if not card.get("parent")), adapters[:wanted]


class OwnServer(NamedTuple):
    """A server that was started for the purpose."""

    url: str
    vocab_size: int
    process_id: int
    startup_seconds: float


@contextmanager
def own_server(options: argparse.Namespace, flags: Sequence[str]) -> Iterator[OwnServer]:
    """A `loraplex serve` with new adapters, a0, a1, ...; it has ended when this is left.

    Its log goes to standard error. Raises RuntimeError if it does not start.
    """
    # Imported late: they bring torch.
    from loraplex.benchmarks.synthetic_adapters import write_adapters
    from loraplex.engine.models.registry import lora_spec

    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=scratch_directory())))
        model, model_flags = options.model, []
        if options.shape is not None:
            model = str(write_model(scratch / options.shape, options.shape))
            model_flags = ["--load-format", "dummy"]
        count = OWN_ADAPTERS if options.num_adapters is None else options.num_adapters
        paths = write_adapters(
            options.adapter_directory or scratch / "adapters",
            lora_spec(model)[0],
            count,
            ranks=options.rank,
            modules=options.modules,
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [
            *(sys.executable, "-m", "loraplex.entrypoints.cli", "serve", model, *model_flags),
            *("--port", str(port), "--log-level", "warning", "--no-access-log", *flags),
            *(["--lora-modules", *(f"{path.name}={path}" for path in paths)] if paths else []),
        ]
        process = subprocess.Popen(command, stdout=sys.stderr)
        stack.callback(stop, process)
        url = f"http://127.0.0.1:{port}"
        began = time.perf_counter()
        wait_until_healthy(url, process)
        startup_seconds = time.perf_counter() - began
        print(f"the server started in {startup_seconds:.1f} s", flush=True)
        yield OwnServer(url, read_vocab_size(model), process.pid, startup_seconds)


def wait_until_healthy(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {process.returncode}")
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start within {START_TIMEOUT:.0f} s")


def stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def latencies(records: Sequence[Record]) -> dict[str, list[float]]:
    """Seconds of the requests that were answered, by kind; ITL has one for every gap."""
    done = [record for record in records if record.error is None]
    return {
        "TTFT": [record.ttft for record in done if record.ttft is not None],
        "TPOT": [record.tpot for record in done if record.tpot is not None],
        "ITL": [gap for record in done for gap in record.gaps],
        "E2E": [record.e2e for record in done if record.e2e is not None],
    }


def summarize(
    records: Sequence[Record],
    seconds: float,
    slo_ttft: float | None = None,
    slo_tpot: float | None = None,
) -> dict[str, Any]:
    """The figures of a run that took so many seconds until its last answer; times are in ms.

    A request is good if it was answered within the limits that are given (seconds).
    """
    done = [record for record in records if record.error is None]
    good = [
        record
        for record in done
        if (slo_ttft is None or (record.ttft or 0) <= slo_ttft)
        and (slo_tpot is None or (record.tpot or 0) <= slo_tpot)
    ]
    num_tokens = sum(record.num_output_tokens for record in done)
    times = latencies(records) | {"send lateness": [record.lateness for record in records]}
    return {
        "seconds": round(seconds, 3),
        "completed": len(done),
        "errors": dict(Counter(record.error for record in records if record.error is not None)),
        "requests_per_second": round(len(done) / seconds, 3),
        "output_tokens_per_second": round(num_tokens / seconds, 1),
        "goodput_requests_per_second": round(len(good) / seconds, 3),
        "good_share": round(len(good) / len(records), 4),
        "milliseconds": {name: milliseconds(values) for name, values in times.items()},
    }


def print_summary(summary: dict[str, Any]) -> None:
    errors = ", ".join(f"{count} x {error}" for error, count in summary["errors"].items())
    print(
        f"{summary['completed']} answered in {summary['seconds']:.1f} s: "
        f"{summary['requests_per_second']:.2f} requests/s, "
        f"{summary['output_tokens_per_second']:.0f} tokens/s, goodput "
        f"{summary['goodput_requests_per_second']:.2f} requests/s ({summary['good_share']:.0%})"
    )
    print(f"errors: {errors or 'none'}")
    print(f"{'ms':14}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}")
    for name, spread in summary["milliseconds"].items():
        values = spread.values() if spread else ()
        print(f"{name:14}" + "".join(f"{value:>10.1f}" for value in values))


def write(
    options: argparse.Namespace,
    server_flags: Sequence[str],
    records: Sequence[Record],
    summary: dict[str, Any],
) -> None:
    """The results, the picture, and the details if they are wanted."""
    name = f"serve_{options.workload}"
    paths = ("output", "details", "adapter_directory")
    secrets = ("api_key",)
    settings = {k: v for k, v in vars(options).items() if k not in (*paths, *secrets)}
    figures = {"settings": settings, "server_flags": list(server_flags), **summary}
    path = write_result(name, figures, options.output)
    print(f"written to {path}")
    title = f"{summary['requests_per_second']:.1f} requests/s"
    picture = plot_latencies(
        {kind: {"": seconds} for kind, seconds in latencies(records).items()},
        title,
        result_path(name, options.output).with_suffix(".png"),
    )
    if picture is not None:
        print(f"written to {picture}")
    if options.details is not None:
        lines = (json.dumps(asdict(record)) + "\n" for record in records)
        options.details.write_text("".join(lines))


if __name__ == "__main__":
    sys.exit(main())
