from __future__ import annotations

import json

from loraplex.benchmarks import server_load


def test_streams_and_cancelled_requests_leave_nothing(tmp_path, capsys):
    output = tmp_path / "server_load.json"
    flags = ["--num-streams", "20", "--num-tokens", "200", "--num-rounds", "1"]
    assert server_load.main([*flags, "--num-cancels", "60", "--output", str(output)]) == 0
    figures = json.loads(output.read_text())["figures"]
    (streams,) = figures["streams"]
    assert streams["tokens_per_second"] > 0
    assert streams["server_cpu_us_per_token"] > 0
    cancels = figures["cancels"]
    assert cancels["num_cancelled"] > 0
    assert cancels["pages_not_in_use_before"] == cancels["pages_not_in_use_after"]
    assert "tokens_per_second" in capsys.readouterr().out
