"""What is exported of a component, by name: pure, from what its processes answer.

Names are an interface: alert rules, dashboards and autoscalers know them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import grpc
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pagehold.admin.v1 import admin_pb2 as admin
from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.kv.v1 import kv_manager_pb2 as kv


@dataclass(frozen=True, slots=True)
class Standing:
    """One process, as its supervisor sees it."""

    component: str
    name: str
    is_ready: bool


def of_supervisor(version: str, standings: Iterable[Standing], deaths: Mapping[str, int]) -> list[Metric]:
    """deaths: of each component, processes that ended unasked."""
    build = GaugeMetricFamily("pagehold_build_info", "1; the version is in the label.", labels=["version"])
    build.add_metric([version], 1)
    ready = GaugeMetricFamily(
        "pagehold_component_ready", "1 while this process serves, 0 while it does not.", labels=["component", "name"]
    )
    for one in standings:
        ready.add_metric([one.component, one.name], one.is_ready)
    died = CounterMetricFamily(
        "pagehold_component_deaths", "Processes that ended unasked and were started again.", labels=["component"]
    )
    for component, count in deaths.items():
        died.add_metric([component], count)
    return [build, ready, died]


def of_manager(stats: kv.GetStatsResponse) -> list[Metric]:
    """Of a kvmanager: pages, rows, records, and what sharing saves."""
    return [
        _gauge("pagehold_pages", "Pages of the pool.", stats.pages),
        _gauge("pagehold_pages_free", "Pages that a new request could get: empty or cached.", stats.free_pages),
        _gauge("pagehold_pages_cached", "Free pages that still hold a prefix.", stats.cached_pages),
        _gauge("pagehold_pages_shared", "Pages in two or more rows.", stats.shared_pages),
        _gauge("pagehold_pages_pinned", "Pages that pinned prefixes hold.", stats.pinned_pages),
        _gauge("pagehold_rows", "Sequences that have pages.", stats.rows),
        _gauge("pagehold_records", "Requests that can be resumed, ended ones among them.", stats.records),
        _gauge("pagehold_executor_attached", "1 while an executor is attached.", stats.executor_attached),
        _gauge("pagehold_epoch", "Executors that have attached to this pool.", stats.epoch),
        _gauge("pagehold_integrity_findings", "Contradictions found in the shared state.", stats.integrity_findings),
        _counter(
            "pagehold_prefix_query_tokens", "Prompt tokens looked up among cached ones.", stats.prefix_query_tokens
        ),
        _counter("pagehold_prefix_hit_tokens", "Prompt tokens that were found there.", stats.prefix_hit_tokens),
    ]


def of_executor(load: ex.GetLoadResponse) -> list[Metric]:
    """Of an executor: who runs, who waits, what was computed."""
    return [
        _gauge("pagehold_sequences_running", "Sequences that have pages.", load.running),
        _gauge("pagehold_sequences_waiting", "Sequences that have none yet, or lost theirs.", load.waiting),
        _counter("pagehold_prefill_tokens", "Prompt tokens computed.", load.prefill_tokens),
        _counter("pagehold_decode_tokens", "Tokens sampled.", load.decode_tokens),
        _counter("pagehold_preemptions", "Rows taken away for want of pages.", load.preemptions),
        _counter("pagehold_draft_tokens", "Guesses at coming tokens that were tried.", load.draft_tokens),
        _counter("pagehold_accepted_tokens", "Those of them that were right.", load.accepted_tokens),
        _counter("pagehold_steps", "Steps computed.", load.steps),
        _counter("pagehold_step_sequences", "Sequences in those steps, all together.", load.step_sequences),
        _counter("pagehold_step_seconds", "Seconds that those steps took, all together.", load.step_seconds),
    ]


def of_frontends(tallies: Mapping[str, admin.GetTallyResponse]) -> list[Metric]:
    """Of frontends, by name: clients' streams, and how they went."""
    opened = GaugeMetricFamily("pagehold_streams_open", "Clients' streams under way.", labels=["name"])
    waiting = GaugeMetricFamily("pagehold_streams_waiting", "Of them, those without a token yet.", labels=["name"])
    ended = CounterMetricFamily("pagehold_answers", "Answers that are over, by status code.", labels=["name", "code"])
    first = HistogramMetricFamily(
        "pagehold_first_token_seconds", "From a request to the first token of its answer.", labels=["name"]
    )
    for name, tally in tallies.items():
        opened.add_metric([name], tally.open)
        waiting.add_metric([name], tally.waiting)
        # All codes, also those that have not been: a rate cannot see the first answer of a series that begins with it.
        for code in sorted({one.name for one in grpc.StatusCode} | set(tally.ended)):
            ended.add_metric([name, code], tally.ended.get(code, 0))
        ends = [*(str(bound) for bound in tally.bounds), "+Inf"]
        first.add_metric([name], list(zip(ends, accumulate(tally.counts), strict=True)), tally.seconds)
    return [opened, waiting, ended, first]


def render(families: Iterable[Metric]) -> bytes:
    """In Prometheus' text format, 0.0.4."""
    registry = CollectorRegistry()
    registry.register(_Ready(families))
    return generate_latest(registry)


class _Ready(Collector):
    """Families that are there already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    """Since the component's process started; `_total` comes after the name."""
    return CounterMetricFamily(name, text, value=value)
