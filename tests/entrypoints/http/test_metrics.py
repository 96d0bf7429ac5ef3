"""What Prometheus is told of adapters and of the phases of requests."""

from __future__ import annotations

from loraplex.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from loraplex.entrypoints.http.metrics import ADAPTER_COUNTERS, PAGE_STATES, ServerMetrics

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
