"""A checking runner that works by itself: a step's tokens are there when it is collected, and not before.

It does everything as late as a device may: block tables are read when a step is submitted, K/V is read and written
when it is collected. Tokens that it has sampled it keeps, for the host may not have them yet.
"""

from __future__ import annotations

import zlib
from collections import deque
from typing import NamedTuple

import numpy as np

from kvmanager.layout import LOW32, U64, PageState, Tables, state_of
from services.executor.runner.base import Chunk, Lane, StepResult
from tests.unit.executor.checking_runner import CheckingRunner, next_token


class Work(NamedTuple):
    """A chunk under way."""

    chunk: Chunk
    row: U64  # the entries that it reads and writes, as they were when the step was submitted
    history: list[int]  # the lane's tokens, as the device has them


class FlyingRunner(CheckingRunner):
    depth = 1

    def __init__(self) -> None:
        super().__init__()
        self.flights: deque[list[Work]] = deque()
        self.most_flights = 0
        self.released = 0

    def prepare(self, lane: Lane, known: int) -> None:
        super().prepare(lane, known)
        assert lane.device is None, "the lane was not released when it lost its row"
        lane.device = lane.tokens[:known].tolist()

    def release(self, lane: Lane) -> None:
        assert lane.device is not None
        lane.device = None
        self.released += 1

    def copy_slots(self, source: int, target: int, count: int) -> None:
        # Before the steps under way, though a device does it behind them: neither may depend on the other.
        for flight in self.flights:
            for _, row, _ in flight:
                assert target not in (row & np.uint64(LOW32)).tolist()
        super().copy_slots(source, target, count)

    def submit(self, chunks: list[Chunk]) -> object:
        flight: list[Work] = []
        for chunk in chunks:
            row, history = chunk.lane.row, chunk.lane.device
            assert row is not None and isinstance(history, list)
            entries = -(-(chunk.start + chunk.count) // self.page_size)
            flight.append(Work(chunk, row[:entries].copy(), history))
        self.flights.append(flight)
        self.most_flights = max(self.most_flights, len(self.flights))
        return flight

    def collect(self, ticket: object) -> StepResult:
        flight = self.flights.popleft()
        assert flight is ticket, "steps are collected in order"
        return self._compute(flight)

    def step(self, chunks: list[Chunk]) -> StepResult:
        return self.collect(self.submit(chunks))

    def finish(self) -> None:
        """The device goes on for a moment after its host has died."""
        while self.flights:
            self._compute(self.flights.popleft())

    def check_pages(self, tables: Tables) -> None:
        """No page of a step under way was taken away."""
        for flight in self.flights:
            for chunk, row, _ in flight:
                for entry in row.tolist():
                    word = int(tables.page_word[entry & LOW32])
                    held = word >> 32 == entry >> 32 and state_of(word) != PageState.FREE
                    assert held, f"a page of a step that is under way was taken away, at {chunk.start}"

    def _compute(self, flight: list[Work]) -> StepResult:
        self.steps += 1
        self.largest_batch = max(self.largest_batch, len(flight))
        sampled = np.zeros(len(flight), np.uint32)
        for number, ((lane, start, count, write_from, sample, _), row, history) in enumerate(flight):
            self.computed_positions += count
            tokens = np.array(history[: start + count], np.uint32)
            assert len(tokens) == start + count, "neither host nor device have this token"
            for position in range(start + count):
                slot = (int(row[position // self.page_size]) & LOW32, position % self.page_size)
                digest = zlib.crc32(tokens[: position + 1].tobytes())
                if position >= max(start, write_from):
                    self.slots[slot] = digest
                else:
                    assert self.slots.get(slot) == digest, f"position {position} holds another token's K/V"
            if sample:
                token = next_token(tokens, lane.sampling.seed, lane.index)
                sampled[number] = token
                if len(history) == start + count:
                    history.append(token)
        return StepResult(sampled, np.full(len(flight), -1.0, np.float32))
