"""Medians of the manager core's calls over plain bytes: pages of 16 tokens, rows that all decode."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from kvmanager.answers import ensure_rows
from kvmanager.core import Granted, ManagerCore
from kvmanager.keys import request_key
from kvmanager.layout import RequestLog, Tables
from kvmanager.prefix import root_hash
from kvmanager.source import Source
from pagehold.kv.v1 import kv_manager_pb2 as kv

PAGE_SIZE = 16
PROMPT = 24  # tokens
ENTRIES = 512


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one call for all rows, unless `call` says otherwise."""

    rows: int
    call: str
    microseconds: float  # median

    @property
    def per_row(self) -> float:
        return self.microseconds / self.rows


class Pool:
    """A core with `rows` decoding sequences of one page and a half each."""

    def __init__(self, rows: int, pages_per_row: int) -> None:
        pages = rows * pages_per_row + 2
        shape = (pages, rows, ENTRIES, PAGE_SIZE)
        self.sources: dict[str, Source] = {}
        self.tables = Tables(bytearray(Tables.nbytes(*shape)), *shape)
        self.core = ManagerCore(self.tables, self.sources.get)
        self.keys = [request_key("bench", str(number)) for number in range(rows)]
        for number, key in enumerate(self.keys):
            capacity = ENTRIES * PAGE_SIZE
            buffer = bytearray(RequestLog.nbytes(1, capacity, False))
            log = RequestLog.create(buffer, 1, capacity, np.full(PROMPT, number, np.uint32), False)
            self.sources[key] = Source(log.outputs, root_hash("model", "bench", ""))

    def make_rows(self) -> list[Granted]:
        return [self.core.ensure(key, 0, PROMPT, 0, 0) for key in self.keys]


def timed(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return (time.perf_counter() - start) * 1e6


def measure(rows: int, rounds: int) -> list[Cost]:
    """One round: every row crosses a page border at once, which is the worst that a step can ask."""
    pool = Pool(rows, rounds + 4)
    made = timed(lambda: pool.make_rows())
    granted = [pool.core.ensure(key, 0, PROMPT, 0, 0) for key in pool.keys]
    numbers = np.array([one.row for one in granted])
    generations = np.array([one.generation for one in granted], np.uint64)
    none = np.zeros(rows, np.int64)
    core: list[float] = []
    call: list[float] = []
    seal: list[float] = []
    for turn in range(rounds):
        capacity = (turn + 3) * PAGE_SIZE
        if turn % 2:
            core.append(timed(lambda c=capacity: pool.core.ensure_rows(numbers, generations, none + c, none)))
        else:
            call.append(timed(lambda c=capacity: _by_message(pool.core, numbers, generations, c)))
        for source in pool.sources.values():
            source.outputs[0].set_progress(capacity - PAGE_SIZE, capacity - PAGE_SIZE)
        seal.append(timed(pool.core.seal_all))
    closed = timed(lambda: [pool.core.close(k, 0, g.generation) for k, g in zip(pool.keys, granted, strict=True)])
    return [
        Cost(rows, "ensure_rows, a new page for each row", statistics.median(core)),
        Cost(rows, "the same, with its messages decoded and encoded", statistics.median(call)),
        Cost(rows, "seal, a page of each row", statistics.median(seal)),
        Cost(rows, "ensure, one row after the other", made),
        Cost(rows, "close, one row after the other", closed),
    ]


def _by_message(core: ManagerCore, numbers: np.ndarray, generations: np.ndarray, capacity: int) -> bytes:
    ask = kv.EnsureRowsRequest(
        rows=numbers, row_generations=generations, capacities=[capacity] * len(numbers), headrooms=[0] * len(numbers)
    )
    call = kv.Call.FromString(kv.Call(ensure_rows=ask).SerializeToString())
    return ensure_rows(core, call.ensure_rows).SerializeToString()


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/core", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 4096], help="how many sequences decode")
    parser.add_argument("--rounds", type=int, default=40, help="calls that the median is taken over")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    costs = [cost for rows in asked.rows for cost in measure(rows, asked.rounds)]
    if asked.json:
        print(json.dumps([asdict(cost) for cost in costs], indent=1))
        return
    print(f"{'rows':>5}  {'microseconds':>12}  {'per row':>8}  call")
    for cost in costs:
        print(f"{cost.rows:>5}  {cost.microseconds:>12.1f}  {cost.per_row:>8.3f}  {cost.call}")


if __name__ == "__main__":
    main()
