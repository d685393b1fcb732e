from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from peers_lib.ratio import as_records, ratios
from peers_lib.report import dump, load
from peers_lib.scenario import Group

from tests.unit.bench.results import LOADS, MACHINE, entrant, outcome, report

ENTRANTS = [entrant("pagehold", "bfloat16"), entrant("peer", "float32"), entrant("other", "float32", "not installed")]
OUTCOMES = [outcome(1, "pagehold bfloat16", 100), outcome(1, "peer float32", 50, same=0.75)]


def test_a_report_survives_its_file() -> None:
    made = report(ENTRANTS, [*OUTCOMES, outcome(2, "peer float32", None)])
    text = dump(made, as_records(ratios(made)))
    assert load(text) == made
    assert json.loads(text)["ratios"][0]["by_round"] == [2.0]


def test_no_number_is_null_in_the_file() -> None:
    first = OUTCOMES[0]
    assert first.figures is not None
    nothing = replace(first, figures=replace(first.figures, between_p50=math.nan))
    text = dump(report(ENTRANTS, [nothing]))
    assert "NaN" not in text
    (found,) = load(text).outcomes
    assert found.figures is not None and math.isnan(found.figures.between_p50)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 2}'])
def test_other_files_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a report"):
        load(text)


def test_only_batches_have_a_bound() -> None:
    loads = {"one": LOADS["one"], "spread": replace(LOADS["one"], group=Group.ARRIVALS)}
    made = report(ENTRANTS, OUTCOMES, loads)
    assert made.bound("spread") is None
    found = made.bound("one")
    assert found is not None and found.tokens == 100
    # The faster of the two products tells what the machine can do.
    assert made.rates is not None and made.rates.flop == MACHINE.gemm_float32_gflops * 1e9
    untold = replace(made, machine=replace(MACHINE, gemm_float32_gflops=None, gemm_bfloat16_gflops=None))
    assert untold.bound("one") is None
