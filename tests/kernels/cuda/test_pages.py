"""Copies of pages: exactly the bytes that are asked for, in both layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.cuda.pages import PageCopy, PageLayout
from tests.kernels.cuda.host import HostDevice

PAGES = 7
LAYOUTS = {
    "page-major": PageLayout.page_major(2, 3, 32, 128, 2),  # more vectors in a run than threads have accesses
    "layer-major": PageLayout.layer_major(2, 3, 32, 128, 2, PAGES),
    "fp8-80": PageLayout.layer_major(3, 1, 8, 80, 1, PAGES),
}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> PageLayout:
    return LAYOUTS[request.param]


def random_pool(layout: PageLayout, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (PAGES * layout.page_bytes,), generator=generator, dtype=torch.uint8)


def blocks_of(pool: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """The pool as [pages, layers, 2, kv_heads, page_size, bytes of a slot]."""
    slot = layout.head_dim * layout.itemsize
    strides = (layout.page_stride, layout.layer_stride, layout.half_stride, layout.page_size * slot, slot, 1)
    return pool.as_strided((PAGES, layout.layers, 2, layout.kv_heads, layout.page_size, slot), strides)


def test_slots_are_copied_for_many_pairs_at_once(host: HostDevice, layout: PageLayout) -> None:
    pool = random_pool(layout, 1)
    expected = pool.clone()
    pairs = torch.tensor([[5, 0, 3, 0], [5, 1, layout.page_size, 0], [2, 6, 1, 0], [2, 3, 0, 0]], dtype=torch.int32)
    for source, target, slots, _ in pairs.tolist():
        blocks_of(expected, layout)[target, ..., :slots, :] = blocks_of(expected, layout)[source, ..., :slots, :]
    PageCopy(host, layout).copy_slots(pool.data_ptr(), pairs.data_ptr(), len(pairs))
    assert torch.equal(pool, expected)


@pytest.mark.parametrize("blocks", [None, 5])
def test_pages_go_out_and_come_back(host: HostDevice, layout: PageLayout, blocks: int | None) -> None:
    copy = PageCopy(host, layout)
    pool, other = random_pool(layout, 1), random_pool(layout, 2)
    out, back = torch.tensor([[6, 0, 3], [1, 4, 2]], dtype=torch.int32)
    packed = torch.full((3 * layout.page_bytes + 16,), 0x5A, dtype=torch.uint8)
    before = pool.clone()
    copy.gather(pool.data_ptr(), out.data_ptr(), packed.data_ptr(), len(out), blocks)
    assert torch.equal(packed[:-16], blocks_of(pool, layout)[out].flatten())
    assert (packed[-16:] == 0x5A).all() and torch.equal(pool, before)

    expected = other.clone()
    blocks_of(expected, layout)[back] = blocks_of(pool, layout)[out]
    copy.scatter(other.data_ptr(), back.data_ptr(), packed.data_ptr(), len(back), blocks)
    assert torch.equal(other, expected)


def test_nothing_to_move_launches_nothing(host: HostDevice, layout: PageLayout) -> None:
    copy = PageCopy(host, layout)
    copy.copy_slots(0, 0, 0)
    copy.gather(0, 0, 0, 0)
    copy.scatter(0, 0, 0, 0, blocks=8)


def test_the_layouts_name_every_byte_once(layout: PageLayout) -> None:
    size = PAGES * layout.page_bytes
    numbered = torch.arange(size, dtype=torch.int64)
    assert np.array_equal(np.sort(blocks_of(numbered, layout).flatten().numpy()), np.arange(size))


def test_slots_without_whole_accesses_are_refused(host: HostDevice) -> None:
    with pytest.raises(ValueError, match="16"):
        PageCopy(host, PageLayout.page_major(1, 1, 8, 72, 1))
