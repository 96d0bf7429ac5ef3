"""What Prometheus is told of adapters and of the phases of requests."""

from __future__ import annotations

from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from loraplex.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from loraplex.entrypoints.http import metrics as metrics_module
from loraplex.entrypoints.http.metrics import (
    ADAPTER_COUNTERS,
    OTHER_ADAPTERS,
    PAGE_STATES,
    ServerMetrics,
)

PAGES = {f"pages_{state}": 1 for state in PAGE_STATES}


def test_adapters_are_counted_by_name():
    adapters = {
        'a"b': {key: i for i, key in enumerate(ADAPTER_COUNTERS)},
        "c": dict.fromkeys(ADAPTER_COUNTERS, 9),
    }
    stats = {**PAGES, "pages_total": 5, "adapters": adapters, "host_adapter_bytes": 5}
    text = ServerMetrics().render((stats, [])).decode()
    assert 'loraplex_adapter_misses_by_name_total{adapter="a\\"b"} 1.0' in text
    assert 'loraplex_adapter_failures_by_name_total{adapter="c"} 9.0' in text
    assert "loraplex_host_adapter_bytes 5.0" in text


def requests_by_adapter(metrics: ServerMetrics) -> dict[str, float]:
    families = text_string_to_metric_families(metrics.render(None).decode())
    samples = next(f.samples for f in families if f.name == "loraplex_requests")
    return {sample.labels["adapter"]: sample.value for sample in samples}


@given(st.lists(st.sampled_from(["", "a", "b", "c", "d", "e"])))
def test_names_that_were_used_last_are_kept_and_no_request_is_lost(names):
    """Nor does any count go down, but that of a name which was forgotten."""
    with patch.object(metrics_module, "MOST_ADAPTERS", 3):
        metrics, before = ServerMetrics(), {}
        for number, name in enumerate(names):
            metrics.request_started(name)
            counts = requests_by_adapter(metrics)
            assert sum(counts.values()) == number + 1
            assert len(counts.keys() - {OTHER_ADAPTERS}) <= 3
            assert name in counts
            assert all(counts[n] >= before[n] for n in counts.keys() & before.keys())
            before = counts
    last_used = list(dict.fromkeys(reversed(names)))[:3]
    assert before.keys() - {OTHER_ADAPTERS} == set(last_used)


def test_the_phases_before_the_first_token_are_apart():
    metrics = ServerMetrics()
    times = RequestMetrics(
        arrival_time=10.0,
        first_scheduled_time=20.0,
        first_token_time=20.5,
        finished_time=21.0,
        download_seconds=4.0,
        host_load_seconds=2.0,
        copy_seconds=1.0,
    )
    completion = CompletionOutput(0, "x", [1], finish_reason="stop")
    metrics.request_ended(RequestOutput("r", None, [1], [completion], True, metrics=times))
    text = metrics.render(None).decode()
    expected = {"queue": 3.0, "download": 4.0, "host_load": 2.0, "copy": 1.0, "prefill": 0.5}
    for phase, seconds in expected.items():
        name = "loraplex_time_to_first_token_phase_seconds_sum"
        assert f'{name}{{phase="{phase}"}} {seconds}' in text
