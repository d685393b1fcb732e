"""Alert rules, and the autoscaler's metric, name what is exported; and each alert has its part in the runbook."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pagehold.admin.v1 import admin_pb2 as admin
from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.kv.v1 import kv_manager_pb2 as kv
from services.frontend.tally import BOUNDS
from services.supervisor import metrics
from tests.deploy.kustomize import build

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy" / "observability" / "alerts.yml"
KUBERNETES = ROOT / "deploy" / "kubernetes"
OF_PROMETHEUS = {"up": {"job", "instance"}}


def exported() -> dict[str, set[str]]:
    """Every name as it is scraped -> its labels, those of the scrape among them."""
    tally = admin.GetTallyResponse(ended={"OK": 1}, bounds=BOUNDS, counts=[0] * (len(BOUNDS) + 1))
    families = [
        *metrics.of_supervisor("0", [metrics.Standing("executor", "executor", True)], {"executor": 0}),
        *metrics.of_manager(kv.GetStatsResponse()),
        *metrics.of_executor(ex.GetLoadResponse()),
        *metrics.of_frontends({"frontend": tally}),
    ]
    text = metrics.render(families).decode()
    return {
        one.name: {*one.labels, "job", "instance"}
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def parts(expression: Any) -> Iterator[Any]:
    """The expression, and all within it."""
    yield expression
    for name in ("lhs", "rhs", "expr", "vector_selector", "param"):
        if (part := getattr(expression, name, None)) is not None:
            yield from parts(part)
    for part in getattr(expression, "args", []):
        yield from parts(part)


def selectors(text: str) -> list[Any]:
    found = [one for one in parts(promql_parser.parse(text)) if isinstance(one, promql_parser.VectorSelector)]
    assert len(found) == len(re.findall(r"\bpagehold_\w+|\bup\b", text)), "a selector was not found"
    return found


def test_alerts_name_what_is_exported() -> None:
    known = exported() | OF_PROMETHEUS
    for rule in rules():
        for selector in selectors(rule["expr"]):
            assert selector.name in known, f"{rule['alert']}: {selector.name}"
            for matcher in selector.matchers.matchers:
                assert matcher.name in known[selector.name], f"{rule['alert']}: {matcher.name}"


def test_summaries_name_labels_that_are_there() -> None:
    known = exported() | OF_PROMETHEUS
    for rule in rules():
        dropped = set()
        for label_list in re.findall(r"without \(([^)]*)\)", rule["expr"]):
            dropped |= {name.strip() for name in label_list.split(",")}
        labels = set.intersection(*(known[one.name] for one in selectors(rule["expr"]))) - dropped
        used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert used <= labels, f"{rule['alert']}: {used - labels}"


def test_the_autoscaler_asks_for_what_the_adapter_makes_of_what_is_exported() -> None:
    adapter = yaml.safe_load((KUBERNETES / "monitoring" / "prometheus-adapter.yaml").read_text())
    made = {promql_parser.parse(rule["seriesQuery"]).name for rule in adapter["rules"]["custom"]}
    assert made <= exported().keys()
    (scaler,) = (one for one in build(KUBERNETES / "base") if one["kind"] == "HorizontalPodAutoscaler")
    asked = {one["pods"]["metric"]["name"] for one in scaler["spec"]["metrics"] if one["type"] == "Pods"}
    assert asked and asked <= made


def test_promtool_agrees(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool here")
    scrape = yaml.safe_load((KUBERNETES / "monitoring" / "prometheus-scrape.yaml").read_text())
    (job,) = scrape["scrape_configs"]
    del job["kubernetes_sd_configs"]  # not every build of promtool knows them
    (tmp_path / "scrape.yaml").write_text(yaml.safe_dump(scrape))
    for words in (
        ("check", "rules", ALERTS),
        ("test", "rules", Path(__file__).parent / "alerts.test.yml"),
        ("check", "config", "--syntax-only", tmp_path / "scrape.yaml"),
    ):
        done = subprocess.run([promtool, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
