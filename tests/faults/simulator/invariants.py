"""What must hold of the shared bytes whenever no call of the manager is under way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvmanager.core import ManagerCore
from kvmanager.layout import LOW32, OutputLog, PageState, Tables, state_of, usable_computed
from kvmanager.prefix import Hash, from_words
from tests.faults.simulator.faults import Violation
from tests.faults.simulator.model import OutputTruth, Vector

_LOW32 = np.uint64(LOW32)


class Pool:
    """The pages' K/V, one number a position, and who may write it."""

    def __init__(self, tables: Tables, content: dict[Hash, tuple[Vector, ...]]) -> None:
        """content: what a page of this hash holds."""
        self.tables = tables
        self.page_size = int(tables.page_tokens.shape[1])
        self.vectors: npt.NDArray[np.int64] = np.zeros(tables.page_tokens.shape, np.int64)
        self._content = content
        self._fillers: dict[tuple[int, int], int] = {}  # (page, generation) -> the row generation that fills it

    def write(self, word: int, place: int, vector: Vector, row_generation: int = 0) -> None:
        """The executor's store of one position's K/V. word: the row's entry; row_generation: 0: not known."""
        page, generation = word & LOW32, word >> 32
        page_word = int(self.tables.page_word[page])
        if state_of(page_word) != PageState.FILLING or page_word >> 32 != generation:
            raise Violation(f"slot {place} of page {page} is written, which is not being filled by its row")
        if self._fillers.setdefault((page, generation), row_generation) != row_generation:
            raise Violation(f"two rows fill page {page} under one generation")
        self.vectors[page, place] = vector

    def check_row(self, truth: OutputTruth, entries: npt.NDArray[np.uint64], computed: int) -> None:
        """What attention would read for positions below `computed`. entries: u64, of the row."""
        if not computed:
            return
        words = entries[: -(-computed // self.page_size)]
        pages = (words & _LOW32).astype(np.int64)
        stale = (pages == 0) | (self.tables.page_word[pages] >> np.uint64(32) != words >> np.uint64(32))
        if stale.any():
            number = int(stale.argmax())
            raise Violation(f"{truth.name} reads page {pages[number]} of another generation as its entry {number}")
        wrong = self.vectors[pages].reshape(-1)[:computed] != truth.kv[:computed]
        if wrong.any():
            position = int(wrong.argmax())
            page = pages[position // self.page_size]
            raise Violation(f"{truth.name} reads foreign or unwritten K/V at position {position}, page {page}")

    def check_sealed(self) -> None:
        for page in np.flatnonzero(self.tables.page_word & np.uint64(0xFF) == PageState.SEALED).tolist():
            if self._content.get(from_words(self.tables.page_hash[page])) != tuple(self.vectors[page].tolist()):
                raise Violation(f"page {page} is sealed over K/V that is not what its hash says")


def check_tokens(truth: OutputTruth, output: OutputLog) -> None:
    tokens = output.tokens[: output.known].tolist()
    if tokens != truth.tokens[: len(tokens)]:
        raise Violation(f"{truth.name} has other tokens than an undisturbed run")


def check_core(core: ManagerCore, pool: Pool, truth_of: Callable[[str, int], OutputTruth]) -> None:
    """Tables, derived state, every row's K/V, every sealed page's K/V, every pinned page."""
    wrong = core.check_integrity()
    if wrong:
        raise Violation(str(wrong[0]))
    tables = core.tables
    for (key, index), row in core.live_rows.items():
        source = core.sources(key)
        if source is None:
            raise Violation(f"row {row.number} has outlived its record")
        truth, output = truth_of(key, index), source.outputs[index]
        check_tokens(truth, output)
        computed = min(usable_computed(tables, row.number, output.computed), output.known)
        pool.check_row(truth, tables.row_entry[row.number], computed)
    pool.check_sealed()
    for row in core.rows.pinned.values():
        entries = tables.row_entry[row.number, : row.length]
        words = tables.page_word[(entries & _LOW32).astype(np.int64)]
        if (words != (entries & ~_LOW32 | np.uint64(PageState.SEALED))).any():
            raise Violation(f"a pinned page of row {row.number} is not sealed, or of another generation")
