"""The memory behind a pool on a device, at each attach: kept, taken back from the executor, or made anew.

this manager has it                                kept: the former executor's death is nothing to it
VMM, and the executor hands its descriptor back    taken back: the former manager's death is nothing to it
else nobody has it any more                        made anew: rows and pages are emptied first (`renewal`)
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from kvmanager.core import ManagerCore
from kvmanager.device.memory import Allocation, DeviceError, Exporter, OutOfMemory
from kvmanager.errors import Refusal, Refused
from kvmanager.geometry import Place
from kvmanager.layout import Header
from kvmanager.pool import Pool

log = structlog.get_logger()

TakeOffer = Callable[[bytes], int | None]  # the descriptor of the pool of this uuid, if the executor offers it


def have_memory(pool: Pool, core: ManagerCore, mapped: bytes, take_offer: TakeOffer, exporter: Exporter) -> bool:
    """Puts memory behind the pool unless it is there. True: it is new, and the pool holds nothing. Raises Refused.

    All other executors are dead. mapped: uuid of the pool whose memory the one that attaches still maps, or nothing.
    """
    if mapped not in (b"", pool.uuid):
        raise Refused(Refusal.STALE_EPOCH, "the executor still maps the memory of another pool; it must start again")
    if pool.memory is not None:
        return False
    if mapped and (fd := take_offer(pool.uuid)) is not None:
        pool.hold(exporter.adopt(fd, pool.nbytes, pool.place.device))
        log.info("the pool's memory is back from its executor", generation=pool.word(Header.POOL_GENERATION))
        return False
    if pool.word(Header.POOL_BYTES):
        pool.lose()
        core.rebuild()
    pool.hold(allocate(exporter, pool.place, pool.nbytes))
    generation = pool.word(Header.POOL_GENERATION)
    log.warning("the pool's memory was lost and is made anew; known tokens are computed again", generation=generation)
    return True


def allocate(exporter: Exporter, place: Place, nbytes: int) -> Allocation:
    """Raises Refused(NO_MEMORY or INVALID)."""
    try:
        return exporter.allocate(nbytes, place.device)
    except OutOfMemory as error:
        raise Refused(Refusal.NO_MEMORY, str(error)) from error
    except DeviceError as error:
        raise Refused(Refusal.INVALID, str(error)) from error
