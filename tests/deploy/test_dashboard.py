"""The dashboard and what Prometheus is told in compose.yaml: names of what is exported, files that are there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.deploy.test_alerts import exported, selectors

ROOT: Final = Path(__file__).parents[2]
OBSERVABILITY: Final = ROOT / "deploy" / "observability"
DASHBOARD: Final = OBSERVABILITY / "grafana" / "dashboards" / "pagehold.json"


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return found


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def test_panels_show_what_is_exported() -> None:
    known = exported()
    shown = set()
    for panel in panels():
        for target in panel["targets"]:
            for selector in selectors(target["expr"]):
                assert selector.name in known, f"{panel['title']}: {selector.name}"
                shown.add(selector.name)
            labels = set.intersection(*(known[one.name] for one in selectors(target["expr"])))
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels, panel["title"]
    # Nothing that is measured is hidden, but the parts that histograms and counters have besides.
    besides = re.compile(r".*_(created|count|sum)$|pagehold_build_info|pagehold_executor_attached")
    assert {name for name in known if not besides.match(name)} <= shown


def test_panels_do_not_overlap() -> None:
    taken = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


def test_data_comes_from_the_service_of_that_name() -> None:
    folder = OBSERVABILITY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert all(panel["datasource"]["uid"] == source["uid"] for panel in panels())
    services = compose()["services"]
    name, port = re.fullmatch(r"http://(\w+):(\d+)", source["url"]).groups()  # type: ignore[union-attr]
    assert services[name]["ports"][0].endswith(f":{port}")
    (provider,) = yaml.safe_load((folder / "dashboards" / "pagehold.yml").read_text())["providers"]
    mounts = dict(one.split(":")[1::-1] for one in services["grafana"]["volumes"])
    assert (ROOT / mounts[provider["options"]["path"]] / DASHBOARD.name).is_file()
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == (
        f"{provider['options']['path']}/{DASHBOARD.name}"
    )


def test_everything_is_scraped() -> None:
    (job,) = yaml.safe_load((OBSERVABILITY / "prometheus.yml").read_text())["scrape_configs"]
    assert job["job_name"] == "pagehold"  # which the alerts name
    (frontends,) = job["dns_sd_configs"]
    targets = {*job["static_configs"][0]["targets"], *(f"{name}:{frontends['port']}" for name in frontends["names"])}
    services = compose()["services"]
    for name, service in services.items():
        environment = service.get("environment", {})
        if (listen := environment.get("PAGEHOLD_METRICS_LISTEN")) is None:
            continue
        names = {name, *service.get("networks", {}).get("default", {}).get("aliases", [])}
        assert {f"{one}:{listen.rpartition(':')[2]}" for one in names} & targets, name


def test_promtool_agrees(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool here")
    config = yaml.safe_load((OBSERVABILITY / "prometheus.yml").read_text())
    config["rule_files"] = [str(OBSERVABILITY / "alerts.yml")]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    done = subprocess.run([promtool, "check", "config", tmp_path / "prometheus.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
