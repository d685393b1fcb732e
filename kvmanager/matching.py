"""What the prefix index holds of a sequence's tokens: whole pages to share, and a part of one to copy.

tokens   0 ........... 1 ........... 2 ........... 3 ..... known
         | whole page  | whole page  | part of a page of another sequence: copied
         |        shared             | then computed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from kvmanager.layout import U32, Tables, generation_of
from kvmanager.pages import Ids
from kvmanager.prefix import Hash, PrefixIndex, page_hash

_MOST_CHILDREN: Final = 64  # pages that are compared for a partial hit; it saves less than a page of computing


@dataclass(frozen=True, slots=True)
class PageCopy:
    """The first `tokens` slots of `page`, as long as its generation is this one."""

    page: int
    generation: int
    tokens: int


def match_pages(tables: Tables, index: PrefixIndex, root: Hash, tokens: U32) -> Ids:
    """The longest chain of sealed pages that starts `tokens`, i64 [pages]; whole pages only.

    All of `tokens` may be covered: the last position then runs again for its logits.
    """
    size, parent = tables.page_tokens.shape[1], root
    matched: list[int] = []
    for start in range(0, len(tokens) - size + 1, size):
        parent = page_hash(parent, tokens[start : start + size])
        page = index.get(parent)
        if page is None:
            break
        matched.append(page)
    pages = np.array(matched, np.int64)
    # A hash is a hint; the tokens decide.
    same = (tables.page_tokens[pages] == tokens[: len(pages) * size].reshape(-1, size)).all(axis=1)
    return pages if same.all() else pages[: int(np.argmin(same))]


def match_part(tables: Tables, index: PrefixIndex, parent: Hash, tokens: U32) -> PageCopy | None:
    """The page behind `parent` that begins with the most of `tokens`, less than a page of them or more; None: none."""
    if not len(tokens):
        return None
    children = index.children(parent, int(tokens[0]))[:_MOST_CHILDREN]
    if not children:
        return None
    wanted = tokens[: tables.page_tokens.shape[1]]
    same = tables.page_tokens[children, : len(wanted)] == wanted
    lengths = np.where(same.all(axis=1), len(wanted), same.argmin(axis=1))
    best = int(lengths.argmax())
    page = children[best]
    return PageCopy(page, generation_of(tables.page_word[page]), int(lengths[best]))
