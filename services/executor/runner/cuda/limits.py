"""The sizes that a runner's buffers are made for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_num_seqs` sequences run at once, `max_batch_tokens` positions are in a step."""

    page_size: int
    max_model_len: int
    max_num_seqs: int
    max_batch_tokens: int

    @property
    def max_lanes(self) -> int:
        """Each holds a row, and the manager has no more. More than run at once may be found after a death."""
        return 2 * self.max_num_seqs

    @property
    def max_rows(self) -> int:
        """Lanes in one step."""
        return min(self.max_lanes, self.max_batch_tokens)

    @property
    def max_decodes(self) -> int:
        """Lanes in one step, as it goes without deaths."""
        return min(self.max_num_seqs, self.max_batch_tokens)

    @property
    def table_entries(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.max_model_len // self.page_size)
