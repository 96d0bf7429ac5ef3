"""What is to be seen of a server: metrics, the pool, the dashboard, a port for administrators."""

from __future__ import annotations

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families
from server_process import ADDRESS, running_server

from loraplex.entrypoints.http.metrics import ALIASES, MOST_ADAPTERS, OTHER_ADAPTERS, ServerMetrics

DASHBOARD = Path(__file__).parents[2] / "deploy/grafana/dashboard.json"


@pytest.fixture(scope="module")
def metrics_text() -> str:
    """Of a server with the real scheduler that has served, and refused."""
    flags = ("--core", "make_scheduled_core", "--request-timeout", "1")
    with running_server(*flags, FAKE_STEP_SECONDS="0.02") as server:
        statuses = []
        for max_tokens in (2, 3, 100):
            body = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": max_tokens}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=20)
            statuses.append(answer.status_code)
        assert statuses == [200, 200, 504]
        return httpx.get(f"{server.url}/metrics").text


def test_the_dashboard_uses_metrics_that_exist(metrics_text):
    names = {s.name for f in text_string_to_metric_families(metrics_text) for s in f.samples}
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    used = {name for text in expressions for name in re.findall(r"loraplex_\w+", text)}
    assert len(used) >= 20
    assert used <= names | PER_ADAPTER


# They have samples while adapters are known.
PER_ADAPTER = {"loraplex_adapter_requests_waiting", "loraplex_adapter_pages"}


def test_other_servers_names_have_the_same_numbers(metrics_text):
    families = {f.name: f for f in text_string_to_metric_families(metrics_text)}
    for own, aliases in ALIASES.items():
        for alias in aliases:
            values = [s.value for s in families[f"loraplex_{own}"].samples]
            assert [s.value for s in families[alias].samples] == values, alias
    names = {s.name for f in families.values() for s in f.samples}
    assert {
        "vllm:num_requests_running", "vllm:time_to_first_token_seconds_bucket",
        "vllm:e2e_request_latency_seconds_sum", "vllm:generation_tokens_total",
        "vllm:request_success_total", "lorax_request_count", "lorax_request_success",
        "lorax_request_failure", "lorax_queue_length", "lorax_request_duration_bucket",
    } <= names  # fmt: skip


def test_adapters_by_name_in_metrics():
    metrics = ServerMetrics()
    stats = dict.fromkeys(["pages_free", "pages_kv_cached", "pages_adapter"], 0)
    stats |= {"pages_total": 10, "pages_kv": 5, "pages_adapter_idle": 0, "num_running": 1}
    adapter = {"num_running": 1, "num_requests": 3, "num_pages": 3}
    adapters = [{"lora_name": f"a{i}", **adapter} for i in range(MOST_ADAPTERS + 5)]
    adapters.append({"lora_name": "a0", **adapter})
    text = metrics.render((stats, adapters)).decode()
    assert 'loraplex_adapter_requests_waiting{adapter="a0"} 4.0' in text
    assert 'loraplex_adapter_pages{adapter="a1"} 3.0' in text
    assert f'loraplex_adapter_requests_running{{adapter="{OTHER_ADAPTERS}"}} 5.0' in text
    assert "vllm:kv_cache_usage_perc 0.5" in text
    for i in range(MOST_ADAPTERS + 5):
        metrics.request_started(f"a{i}")
    text = metrics.render(None).decode()
    assert f'loraplex_requests_total{{adapter="{OTHER_ADAPTERS}"}} 5.0' in text
    assert "loraplex_pages{" not in text


def test_metrics_as_json(server):
    httpx.post(f"{server.url}/generate", json={"inputs": "hello"})
    answer = httpx.get(f"{server.url}/metrics", headers={"accept": "application/json"}).json()
    assert answer["loraplex_pages"]["type"] == "gauge"
    pages = {sample["key"]: sample["value"] for sample in answer["loraplex_pages"]["data"]}
    assert pages['loraplex_pages{state="free"}'] == 10
    (count,) = answer["lorax_queue_length"]["data"]
    assert count == {"key": "lorax_queue_length", "value": 0}


def test_the_pool(server):
    pool = httpx.get(f"{server.url}/admin/pool").json()
    assert pool["stats"]["pages_total"] == 10
    assert pool["adapters"] == []


def test_administrators_may_have_a_port_of_their_own(adapter_root):
    with running_server("--admin-port", "0", "--allow-runtime-lora", str(adapter_root)) as server:
        public, admin = ADDRESS.findall(server.log)
        for path in ("/metrics", "/admin/pool"):
            assert httpx.get(f"{public}{path}").status_code == 404
            assert httpx.get(f"{admin}{path}").status_code == 200
        body = {"lora_name": "sql", "lora_path": str(adapter_root / "sql")}
        assert httpx.post(f"{public}/v1/load_lora_adapter", json=body).status_code == 404
        assert httpx.post(f"{admin}/v1/load_lora_adapter", json=body).status_code == 200
        body = {"model": "sql", "prompt": "hello"}
        assert httpx.post(f"{public}/v1/completions", json=body).status_code == 200
        assert httpx.post(f"{admin}/v1/completions", json=body).status_code == 404
        for url in (public, admin):
            for path in ("/health", "/live", "/ready", "/v1/models"):
                assert httpx.get(f"{url}{path}").status_code == 200
        assert server.stop() == 0


class Collector(BaseHTTPRequestHandler):
    """Takes spans as OTLP over HTTP."""

    spans: ClassVar[list[Span]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_traces():
    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with running_server("--otlp-endpoint", endpoint) as server:
        body = {"model": "fake", "prompt": "secret"}
        headers = {"traceparent": f"00-{trace_id}-{parent_id}-01", "x-request-id": "mine"}
        httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)
        httpx.post(f"{server.url}/v1/completions", json={**body, "model": "nobody"})
        assert server.stop() == 0
    collector.shutdown()
    spans = [span for span in Collector.spans if span.name == "POST /v1/completions"]
    served, refused = sorted(spans, key=lambda span: span.start_time_unix_nano)
    assert served.trace_id.hex() == trace_id
    assert served.parent_span_id.hex() == parent_id
    attributes = {a.key: a.value for a in served.attributes}
    assert attributes["gen_ai.usage.input_tokens"].int_value == 7
    assert attributes["gen_ai.usage.output_tokens"].int_value == 7
    assert attributes["loraplex.request_id"].string_value == "mine"
    assert attributes["gen_ai.latency.time_to_first_token"].double_value > 0
    assert "secret" not in str(served)
    assert {a.key: a.value.int_value for a in refused.attributes}[
        "http.response.status_code"
    ] == 404
