"""What is exported reads back as what was said."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from pagehold.admin.v1 import admin_pb2 as admin
from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.kv.v1 import kv_manager_pb2 as kv
from services.supervisor import metrics
from services.supervisor.metrics import Standing


def samples(families: list[object]) -> dict[tuple[str, ...], float]:
    """(name, label values in the order of their names) -> value, through the text."""
    text = metrics.render(families).decode()  # type: ignore[arg-type]
    return {
        (one.name, *(value for _, value in sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def test_every_figure_of_manager_and_executor_comes_once() -> None:
    stats = kv.GetStatsResponse(
        pages=11, free_pages=12, cached_pages=13, shared_pages=14, rows=15, records=16, epoch=17,
        executor_attached=True, prefix_hit_tokens=18, prefix_query_tokens=19, pinned_pages=20, integrity_findings=21,
    )  # fmt: skip
    load = ex.GetLoadResponse(
        running=1, waiting=2, prefill_tokens=5, decode_tokens=6, preemptions=7, draft_tokens=8, accepted_tokens=9,
        steps=22, step_sequences=23, step_seconds=24.5,
    )  # fmt: skip
    assert sorted(samples(metrics.of_manager(stats)).values()) == [1, *range(11, 22)]
    found = samples(metrics.of_executor(load))
    assert found[("pagehold_sequences_waiting",)] == 2
    assert found[("pagehold_accepted_tokens_total",)] == 9
    assert found[("pagehold_step_seconds_total",)] == 24.5
    assert sorted(found.values()) == [1, 2, 5, 6, 7, 8, 9, 22, 23, 24.5]


def test_processes_are_told_apart() -> None:
    standings = [Standing("executor", "executor", True), Standing("executor", "executor-standby", False)]
    found = samples(metrics.of_supervisor("1.2", standings, {"executor": 3}))
    assert found == {
        ("pagehold_build_info", "1.2"): 1,
        ("pagehold_component_ready", "executor", "executor"): 1,
        ("pagehold_component_ready", "executor", "executor-standby"): 0,
        ("pagehold_component_deaths_total", "executor"): 3,
    }


def test_a_histogram_counts_upwards() -> None:
    tally = admin.GetTallyResponse(
        open=3, waiting=2, ended={"OK": 5, "UNAVAILABLE": 1}, bounds=[0.5, 2], counts=[4, 0, 2], seconds=9.5
    )
    found = samples(metrics.of_frontends({"frontend": tally}))
    first = "pagehold_first_token_seconds"
    assert {key: value for key, value in found.items() if key[0].startswith(first)} == {
        (f"{first}_bucket", "0.5", "frontend"): 4,
        (f"{first}_bucket", "2.0", "frontend"): 4,
        (f"{first}_bucket", "+Inf", "frontend"): 6,
        (f"{first}_count", "frontend"): 6,
        (f"{first}_sum", "frontend"): 9.5,
    }
    assert found[("pagehold_answers_total", "UNAVAILABLE", "frontend")] == 1


def test_every_code_is_there_before_its_first_answer() -> None:
    """Or a burst of errors that are the first of their kind would be no increase to whoever scrapes."""
    answers = {
        labels[0]: value
        for (name, *labels), value in samples(
            metrics.of_frontends({"frontend": admin.GetTallyResponse(ended={"OK": 5}, counts=[5])})
        ).items()
        if name == "pagehold_answers_total"
    }
    assert answers.pop("OK") == 5
    assert {"INTERNAL", "UNAVAILABLE", "UNKNOWN", "DATA_LOSS", "RESOURCE_EXHAUSTED"} <= answers.keys()
    assert not any(answers.values())
