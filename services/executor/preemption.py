"""Whose row is taken away when pages or lanes run out: a pure choice.

0. Nobody whose pages a sibling has just asked to share: the answer is there in a moment.
1. A parked sequence goes first: nobody waits for its tokens.
2. Else one of the lowest priority among all that run. A waiting sequence takes only from strictly
   lower ones, so no two can take from each other in turn.
3. Never one that has its row back and has not committed a token since: it holds all the pages that
   its next token needs, so whoever lacks some waits that long. Each row that is given therefore
   yields a token, and all come to their end. Who starves has committed tokens, so somebody can
   always be chosen in the end.
4. Of the rest, those that have committed less than a page of tokens since they got their row back
   are spared if there are others, so that the same one is not picked twice in a row.
5. Of those the latest arrival. It gives up its whole row; what was sealed may be found again.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from services.executor.sequence import Sequence


def choose_victim(
    running: Ordered[Sequence], parked: Ordered[Sequence], page_size: int, below: int | None = None
) -> Sequence | None:
    """None: nobody, or nobody yet.

    running: all that have a row, in order of priority, then arrival. parked: those of them that rest, in the
    same order. below: the priority of a waiting sequence that asks for room; None: one that runs does.
    """
    candidates = parked or _lowest(running, page_size, below)
    return next((sequence for sequence in reversed(candidates) if not sequence.is_being_forked), None)


def _lowest(running: Ordered[Sequence], page_size: int, below: int | None) -> Ordered[Sequence]:
    lowest = running[-1].priority if running else None
    if lowest is None or (below is not None and lowest >= below):
        return ()
    able = [sequence for sequence in running if sequence.priority == lowest and sequence.since_resumed != 0]
    settled = [sequence for sequence in able if sequence.since_resumed is None or sequence.since_resumed >= page_size]
    return settled or able
