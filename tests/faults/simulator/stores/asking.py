"""The executor's calls, as acts on the manager's core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvmanager.core import ManagerCore
from tests.faults.simulator.faults import Violation
from tests.faults.simulator.stores.running import Running
from tests.faults.simulator.stores.world import Act, Answer


def first_row(asker: Running, parent: Running | None, headroom: int, keep_free: int) -> Act:
    """A row of its own, or a fork of the sibling's at the end of their prompt."""
    key, index, need = asker.key, asker.index, asker.need
    if parent is None:
        return lambda core: core.ensure(key, index, need, headroom, keep_free)
    sibling, generation, length = parent.index, parent.generation, asker.log.prompt_length
    return lambda core: core.fork(key, index, sibling, generation, length, need, headroom, keep_free)


@dataclass(frozen=True, slots=True)
class Growth:
    """One `ensure_rows`; behind the rows in use it names some that are gone."""

    sequences: list[Running]
    generations: list[int]
    needs: list[int]
    most: list[int]  # tokens, headroom included
    act: Act

    def check(self, answer: Answer) -> list[int]:
        """What each row holds now; those that are gone must be said to be."""
        held = np.asarray(answer).tolist()
        count = len(self.sequences)
        if any(held[count:]):
            raise Violation("a row that was closed is said to hold tokens")
        return held[:count]


def growth(askers: Sequence[Running], gone: Sequence[tuple[Running, int, int]], headroom: int) -> Growth:
    """gone: rows that were closed, with the generation that they had."""
    used = {asker.row for asker in askers}
    old = {row: generation for _, row, generation in gone if row not in used}
    needs = [asker.need for asker in askers]
    extras = [min(headroom, asker.limit - asker.need) for asker in askers]
    rows = np.array([*(asker.row for asker in askers), *old], np.int64)
    generations = np.array([*(asker.generation for asker in askers), *old.values()], np.uint64)
    capacities = np.array([*needs, *[1 << 10 for _ in old]], np.int64)
    headrooms = np.array([*extras, *[0 for _ in old]], np.int64)

    def act(core: ManagerCore) -> Answer:
        return core.ensure_rows(rows, generations, capacities, headrooms)

    most = [need + extra for need, extra in zip(needs, extras, strict=True)]
    return Growth(list(askers), [asker.generation for asker in askers], needs, most, act)


def trim(asker: Running, capacity: int, generation: int | None = None) -> Act:
    key, index, current = asker.key, asker.index, asker.generation if generation is None else generation
    return lambda core: core.trim(key, index, current, capacity)


def close(asker: Running, generation: int) -> Act:
    key, index = asker.key, asker.index
    return lambda core: core.close(key, index, generation)
