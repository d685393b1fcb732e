"""Who computes what in the next step: a pure plan over sequences, without clock or I/O.

Decodes come first, one position each, so that no stream waits for a neighbour's prompt;
what is left of the token budget goes to prompts in order of arrival. A step of few positions may have drafts besides.

The step before may still be under way: a plan counts its positions as computed and its tokens as known.
"""

from __future__ import annotations

from bisect import insort
from typing import NamedTuple

from services.executor.runner.base import Chunk, DraftLimits
from services.executor.sequence import Phase, Sequence


class Plan(NamedTuple):
    """One step: `chunks[i]` advances `sequences[i]`."""

    sequences: list[Sequence]
    chunks: list[Chunk]
    drafts: int = 0  # at most, of all chunks

    @property
    def positions(self) -> int:
        """Without drafts."""
        return sum(chunk.count for chunk in self.chunks)


class Scheduler:
    """The waiting and the running sequences, each in order of priority, then arrival."""

    def __init__(
        self,
        page_size: int,
        max_num_seqs: int,
        max_batch_tokens: int,
        park_after: int,
        drafts: DraftLimits | None = None,
    ) -> None:
        """drafts: the runner's; a step with drafts is within `max_batch_tokens`, for what they allow is."""
        assert drafts is None or max(drafts.rows, drafts.granted) <= max_batch_tokens
        self.page_size = page_size
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.park_after = park_after  # unread tokens of a detached output
        self.drafts = drafts
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        queue = self.running if sequence.phase is Phase.RUNNING else self.waiting
        insort(queue, sequence, key=lambda s: s.priority_key)

    def start(self, sequence: Sequence) -> None:
        """It has a row now."""
        self.waiting.remove(sequence)
        sequence.phase = Phase.RUNNING
        self.add(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """It lost its row and computes again from the start, or from what is still cached."""
        self.running.remove(sequence)
        sequence.phase = Phase.WAITING
        self.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It has ended."""
        (self.running if sequence.phase is Phase.RUNNING else self.waiting).remove(sequence)
        sequence.phase = Phase.ENDED

    def parked(self, sequence: Sequence) -> bool:
        """A detached output that nobody has read for a while keeps its pages and rests."""
        return sequence.request.connection is None and sequence.length - sequence.cursor >= self.park_after

    def resting(self) -> list[Sequence]:
        """The parked ones that have a row, in order."""
        return [sequence for sequence in self.running if sequence.request.connection is None and self.parked(sequence)]

    def plan(self) -> Plan:
        """The chunks of one step; every position lies within its row."""
        budget = self.max_batch_tokens
        sequences: list[Sequence] = []
        chunks: list[Chunk] = []
        prefills: list[Sequence] = []
        for sequence in self.running:
            if sequence.known - sequence.computed > 1:
                prefills.append(sequence)
            elif sequence.known > sequence.limit:
                pass  # its last token is on its way
            elif budget > 0 and sequence.capacity >= sequence.known and not self.parked(sequence):
                # Nothing left to compute (a full prefix hit): the last position runs again
                # for its logits, its K/V write masked.
                sequences.append(sequence)
                chunks.append(Chunk(sequence.lane, sequence.known - 1, 1, sequence.computed, True))
                budget -= 1
        decodes = len(chunks)
        for sequence in prefills:
            count = min(sequence.known - sequence.computed, sequence.capacity - sequence.computed, budget)
            if count <= 0 or self.parked(sequence):
                continue
            samples = sequence.computed + count == sequence.known
            sequences.append(sequence)
            chunks.append(Chunk(sequence.lane, sequence.computed, count, sequence.computed, samples))
            budget -= count
        drafts = self._draft(sequences[:decodes], chunks, self.max_batch_tokens - budget)
        return Plan(sequences, chunks, drafts)

    def _draft(self, decodes: list[Sequence], chunks: list[Chunk], positions: int) -> int:
        """Says how many drafts each of the decodes may have, whose chunks come first; how many all have at most."""
        if self.drafts is None:
            return 0
        each, room = self.drafts.each, self.drafts.room(positions)
        left = each if room else self.drafts.granted - positions  # of what is granted, not of what is shared
        wanted = 0
        if left <= 0:
            return 0
        for number, sequence in enumerate(decodes):
            known, drafting = sequence.known, sequence.drafting
            if known < drafting.resumes_at:
                continue
            likely = each if room else drafting.likely or known >= drafting.probes_at
            # Within the row; and the token after the last of them still has its place in the log.
            most = min(drafting.allowed, each, likely, left, sequence.capacity - known, sequence.limit - known)
            if most > 0:
                lane, start, count, write_from, sample, _ = chunks[number]
                chunks[number] = Chunk(lane, start, count, write_from, sample, most)
                wanted += most
                if not room:
                    left -= most
        return self.drafts.most(positions, wanted)

    def admissible(self) -> int:
        """How many more sequences may get a row."""
        asking = sum(sequence.asking for sequence in self.waiting)
        return max(self.max_num_seqs - len(self.running) - asking, 0)

    def filling(self) -> dict[bytes, list[Sequence]]:
        """Sequences whose prompt is being computed, or will be as soon as their row comes; by their opening."""
        found: dict[bytes, list[Sequence]] = {}
        for other in self.running:
            if other.settled < other.prompt_length:
                found.setdefault(other.opening, []).append(other)
        for other in self.waiting:
            if other.asking:
                found.setdefault(other.opening, []).append(other)
        return found

    def shares_unfilled_page(self, sequence: Sequence, filling: list[Sequence]) -> bool:
        """Whether one of `filling`, all of the same opening, is about to fill a page that this one would match next."""
        tokens, known = sequence.lane.tokens, sequence.committed
        for other in filling:
            # The next page border after what the neighbour has computed is the one to wait for.
            border = (other.settled // self.page_size + 1) * self.page_size
            if border <= min(known, other.committed) and bool((tokens[:border] == other.lane.tokens[:border]).all()):
                return True
        return False
