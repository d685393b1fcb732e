"""Requests whose `open` is not answered yet, and what their frontends want of them meanwhile.

The manager may be away for long, so streams come, go and are taken over here as well; what they
asked for is done when the answer comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pagehold.executor.v1 import executor_pb2 as ex
from services.executor import publisher
from services.executor.publisher import Connection

_MOST_BYTES: Final = 256 << 20  # of records on their way


@dataclass(slots=True)
class Opening:
    connection: Connection | None  # None: detached already
    stream_id: int
    digest: bytes
    nbytes: int
    attach: ex.Attach | None = None  # the newest stream came by `attach`
    cancelled: bool = False
    expires: float = 0.0  # monotonic seconds; while detached


class Openings:
    """By key."""

    def __init__(self) -> None:
        self._openings: dict[str, Opening] = {}
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._openings)

    def __contains__(self, key: str) -> bool:
        return key in self._openings

    def __getitem__(self, key: str) -> Opening:
        return self._openings[key]

    @property
    def is_full(self) -> bool:
        return self._nbytes > _MOST_BYTES

    def begin(self, key: str, connection: Connection, stream_id: int, digest: bytes, nbytes: int) -> None:
        self._openings[key] = Opening(connection, stream_id, digest, nbytes)
        self._nbytes += nbytes

    def end(self, key: str) -> Opening:
        """The answer is there."""
        opening = self._openings.pop(key)
        self._nbytes -= opening.nbytes
        return opening

    def take_over(self, key: str, connection: Connection, stream_id: int, attach: ex.Attach | None) -> None:
        """The newest stream wins, also before the request is open."""
        opening = self._openings[key]
        if opening.connection is not None and (opening.connection, opening.stream_id) != (connection, stream_id):
            publisher.fail(opening.connection, opening.stream_id, ex.FAILURE_TAKEN_OVER)
        opening.connection, opening.stream_id, opening.attach = connection, stream_id, attach

    def detach(self, connection: Connection, stream_id: int | None, expires: float) -> None:
        """One stream of a connection is gone, or with None all of them."""
        for opening in self._openings.values():
            if opening.connection is connection and stream_id in (None, opening.stream_id):
                opening.connection, opening.expires = None, expires
