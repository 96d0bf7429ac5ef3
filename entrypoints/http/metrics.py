"""What Prometheus scrapes: the requests as the server saw them, and the core's own counts."""

from __future__ import annotations

from collections import Counter as Counts
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from operator import itemgetter
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from loraplex.engine.outputs import RequestOutput

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0,
    100.0, 250.0,
)  # fmt: skip
LENGTHS = tuple(2**i for i in range(18))
PAGE_STATES = ("free", "kv", "kv_cached", "adapter", "adapter_idle")
GAUGES = {
    "num_running": ("num_requests_running", "Requests that run."),
    "num_waiting": ("num_requests_waiting", "Requests that wait for memory or their adapter."),
    "num_adapters_resident": ("num_adapters_resident", "Adapters in the page pool."),
    "num_fetching": ("num_requests_fetching", "Those of them whose adapter is fetched."),
    "host_adapters": ("num_adapters_in_host_memory", "Adapters in host memory."),
    "host_adapter_bytes": ("host_adapter_bytes", "Bytes of adapters in host memory."),
    "page_bytes": ("page_bytes", "Bytes of a page."),
}
ADAPTER_COUNTERS = {
    "hits": "Requests that found their adapter in the pool.",
    "misses": "Requests that did not find their adapter in the pool.",
    "loads": "Copies of the adapter into the pool.",
    "evictions": "Times that the adapter's pages were reclaimed.",
    "downloads": "Downloads of the adapter.",
    "failures": "Requests that failed because their adapter could not be had or served.",
}
PHASES = ("queue", "download", "host_load", "copy", "prefill")
COUNTERS = {
    "steps": ("engine_steps", "Steps of the engine."),
    "requests_isolated": ("requests_isolated", "Requests refused because they broke a step."),
    "preemptions": ("num_preemptions", "Requests that gave their memory back and began again."),
    "adapter_loads": ("adapter_loads", "Adapters copied into the page pool."),
    "adapter_evictions": ("adapter_evictions", "Adapters whose pages were reclaimed."),
    "host_adapter_reads": ("host_adapter_reads", "Adapters read into host memory."),
    "host_adapter_drops": ("host_adapter_drops", "Adapters dropped from host memory."),
    "adapter_fetches": ("adapter_fetches", "Times that an adapter's source was asked for it."),
    "adapter_fetch_failures": ("adapter_fetch_failures", "Fetches that failed."),
    "adapter_downloaded_bytes": ("adapter_downloaded_bytes", "Bytes of downloaded adapters."),
    "prefix_hit_tokens": ("prefix_cache_hit_tokens", "Prompt tokens found in the KV cache."),
}


# Labels with adapters' names are given to so many at most: clients may make names up.
MOST_ADAPTERS = 1000
OTHER_ADAPTERS = "(others)"
# The names that dashboards made for vLLM and LoRAX know the same numbers by.
ALIASES = {
    "num_requests_running": ("vllm:num_requests_running", "lorax_batch_current_size"),
    "num_requests_waiting": ("vllm:num_requests_waiting", "lorax_queue_length"),
    "kv_cache_usage": ("vllm:kv_cache_usage_perc",),
    "num_preemptions": ("vllm:num_preemptions",),
    "prefix_cache_hit_tokens": ("vllm:prefix_cache_hits",),
    "prompt_tokens": ("vllm:prompt_tokens",),
    "generation_tokens": ("vllm:generation_tokens",),
    "request_success": ("vllm:request_success", "lorax_request_success"),
    "request_failure": ("lorax_request_failure",),
    "requests": ("lorax_request_count",),
    "request_prompt_tokens": ("vllm:request_prompt_tokens", "lorax_request_input_length"),
    "request_generation_tokens": (
        "vllm:request_generation_tokens", "lorax_request_generated_tokens",
    ),
    "time_to_first_token_seconds": ("vllm:time_to_first_token_seconds",),
    "time_per_output_token_seconds": (
        "vllm:request_time_per_output_token_seconds", "lorax_request_mean_time_per_token_duration",
    ),
    "request_queue_time_seconds": (
        "vllm:request_queue_time_seconds", "lorax_request_queue_duration",
    ),
    "request_inference_time_seconds": (
        "vllm:request_inference_time_seconds", "lorax_request_inference_duration",
    ),
    "e2e_request_latency_seconds": ("vllm:e2e_request_latency_seconds", "lorax_request_duration"),
}  # fmt: skip


class CoreCollector(Collector):
    """The numbers of the core; set them before a scrape. None while it can't tell."""

    def __init__(self) -> None:
        self.stats: dict[str, Any] | None = None
        self.adapters: list[dict[str, Any]] = []

    def collect(self) -> Iterator[Metric]:
        stats = self.stats
        if stats is None:
            return
        in_use = stats["pages_kv"] / stats["pages_total"]
        yield GaugeMetricFamily(
            "loraplex_kv_cache_usage", "Part of the pool that holds KV in use.", value=in_use
        )
        yield from self._collect_adapters()
        pages = GaugeMetricFamily("loraplex_pages", "Pages of the pool by state.", labels=["state"])
        for state in PAGE_STATES:
            pages.add_metric([state], stats[f"pages_{state}"])
        yield pages
        for key, (name, text) in GAUGES.items():
            if key in stats:
                yield GaugeMetricFamily(f"loraplex_{name}", text, value=stats[key])
        for key, (name, text) in COUNTERS.items():
            if key in stats:
                yield CounterMetricFamily(f"loraplex_{name}", text, value=stats[key])
        adapters = stats.get("adapters", {})
        for key, text in ADAPTER_COUNTERS.items():
            family = CounterMetricFamily(
                f"loraplex_adapter_{key}_by_name", text, labels=["adapter"]
            )
            for name, counts in adapters.items():
                family.add_metric([name], counts[key])
            yield family

    def _collect_adapters(self) -> Iterator[Metric]:
        families = {
            "num_running": GaugeMetricFamily(
                "loraplex_adapter_requests_running", "Requests that run.", labels=["adapter"]
            ),
            "num_waiting": GaugeMetricFamily(
                "loraplex_adapter_requests_waiting", "Requests that wait.", labels=["adapter"]
            ),
            "num_pages": GaugeMetricFamily(
                "loraplex_adapter_pages", "Pages in the pool.", labels=["adapter"]
            ),
        }
        # An adapter may be there in several versions.
        totals: dict[str, Counts] = {}
        for adapter in sorted(self.adapters, key=itemgetter("num_requests"), reverse=True):
            name = adapter["lora_name"]
            if name not in totals and len(totals) >= MOST_ADAPTERS:
                name = OTHER_ADAPTERS
            totals.setdefault(name, Counts()).update(
                num_running=adapter["num_running"],
                num_waiting=adapter["num_requests"] - adapter["num_running"],
                num_pages=adapter["num_pages"],
            )
        for name, counts in totals.items():
            for key, family in families.items():
                family.add_metric([name], counts[key])
        yield from families.values()


class RequestCollector(Collector):
    """Requests by adapter, for the names that were used last. When a name is forgotten its requests
    count among the others', so that the sum stays right and no counter goes down."""

    def __init__(self) -> None:
        # In order of use, the last used at the end.
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._others = 0

    def count(self, adapter: str) -> None:
        """One more; "" is the base model."""
        self._counts[adapter] = self._counts.pop(adapter, 0) + 1
        if len(self._counts) > MOST_ADAPTERS:
            self._others += self._counts.popitem(last=False)[1]

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "loraplex_requests", "Requests by adapter; none is the base model.", labels=["adapter"]
        )
        for name, count in self._counts.items():
            family.add_metric([name], count)
        if self._others:
            family.add_metric([OTHER_ADAPTERS], self._others)
        yield family


class AliasCollector(Collector):
    """The numbers of a registry again, by the names that others have for them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            for alias in ALIASES.get(metric.name.removeprefix("loraplex_"), ()):
                yield _renamed(metric, alias)


def _renamed(metric: Metric, name: str) -> Metric:
    # LoRAX's counters don't end in _total, which the format asks of counters.
    is_lorax = name.startswith("lorax_")
    kind = "unknown" if is_lorax and metric.type == "counter" else metric.type
    renamed = Metric(name, metric.documentation, kind)
    for sample in metric.samples:
        suffix = sample.name.removeprefix(metric.name)
        if suffix == "_created":
            continue
        if kind == "unknown":
            suffix = ""
        renamed.add_sample(name + suffix, sample.labels, sample.value)
    return renamed


def _sample_key(sample: Sample) -> str:
    labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
    return f"{sample.name}{{{labels}}}" if labels else sample.name


class ServerMetrics:
    """Counts of one server. A registry of its own, so that two servers may share a process."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        count = partial(Counter, registry=registry)
        seconds = partial(Histogram, registry=registry, buckets=SECONDS)
        tokens = partial(Histogram, registry=registry, buckets=LENGTHS)
        self.engine_restarts = count(
            "loraplex_engine_restarts", "Engines that died and were started again."
        )
        self._core = CoreCollector()
        registry.register(self._core)
        self._requests = RequestCollector()
        registry.register(self._requests)
        self._successes = count(
            "loraplex_request_success", "Completions by finish reason.", ["finished_reason"]
        )
        self._failures = count(
            "loraplex_request_failure", "Requests that ended with an error.", ["status"]
        )
        self._prompt_tokens = count("loraplex_prompt_tokens", "Prompt tokens of ended requests.")
        self._generation_tokens = count(
            "loraplex_generation_tokens", "Tokens generated for ended requests."
        )
        self._first_token = seconds(
            "loraplex_time_to_first_token_seconds", "From arrival to the first token."
        )
        self._per_token = seconds(
            "loraplex_time_per_output_token_seconds", "Between tokens, mean of a request."
        )
        self._queue = seconds(
            "loraplex_request_queue_time_seconds", "From arrival to the first step."
        )
        self._phases = seconds(
            "loraplex_time_to_first_token_phase_seconds",
            "What a request waited for until its first token.",
            ["phase"],
        )
        self._inference = seconds(
            "loraplex_request_inference_time_seconds", "From the first step to the last token."
        )
        self._end_to_end = seconds(
            "loraplex_e2e_request_latency_seconds", "From arrival to the last token."
        )
        self._prompt_lengths = tokens(
            "loraplex_request_prompt_tokens", "Prompt tokens of a request."
        )
        self._output_lengths = tokens(
            "loraplex_request_generation_tokens", "Tokens generated for a request."
        )
        self._aliases = CollectorRegistry()
        self._aliases.register(AliasCollector(registry))

    def request_started(self, adapter: str) -> None:
        """A request for this adapter; "" is the base model."""
        self._requests.count(adapter)

    def request_ended(self, output: RequestOutput | None) -> None:
        """A request ended, finished or because its client left; its last output, if any."""
        if output is None:
            self._successes.labels("abort").inc()
            return
        num_tokens = 0
        for completion in output.outputs:
            self._successes.labels(completion.finish_reason or "abort").inc()
            num_tokens += len(completion.token_ids)
        self._prompt_tokens.inc(len(output.prompt_token_ids))
        self._generation_tokens.inc(num_tokens)
        self._prompt_lengths.observe(len(output.prompt_token_ids))
        self._output_lengths.observe(num_tokens)
        if output.finished:
            self._observe_times(output, num_tokens / len(output.outputs))

    def request_failed(self, status: int) -> None:
        """A request ended with an error of this HTTP status."""
        self._failures.labels(str(status)).inc()

    def render(self, core: tuple[dict[str, Any], list[dict[str, Any]]] | None) -> bytes:
        """The text that Prometheus reads. core: its stats and adapters, if it can tell."""
        self._core.stats, self._core.adapters = core or (None, [])
        return generate_latest(self._registry) + generate_latest(self._aliases)

    def as_json(
        self, core: tuple[dict[str, Any], list[dict[str, Any]]] | None
    ) -> dict[str, dict[str, Any]]:
        """The same in LoRAX's form: by name, the type and the samples."""
        self._core.stats, self._core.adapters = core or (None, [])
        metrics = [*self._registry.collect(), *self._aliases.collect()]
        return {
            metric.name: {
                "type": metric.type,
                "data": [{"key": _sample_key(s), "value": s.value} for s in metric.samples],
            }
            for metric in metrics
        }

    def _observe_times(self, output: RequestOutput, num_tokens: float) -> None:
        times = output.metrics
        self._end_to_end.observe(times.finished_time - times.arrival_time)
        if times.first_scheduled_time:
            self._queue.observe(times.first_scheduled_time - times.arrival_time)
            self._inference.observe(times.finished_time - times.first_scheduled_time)
        if times.first_token_time:
            self._first_token.observe(times.first_token_time - times.arrival_time)
            for phase in PHASES:
                self._phases.labels(phase).observe(max(0.0, getattr(times, f"{phase}_seconds")))
            if num_tokens > 1:
                elapsed = times.finished_time - times.first_token_time
                self._per_token.observe(elapsed / (num_tokens - 1))
