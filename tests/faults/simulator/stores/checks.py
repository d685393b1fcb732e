"""What must hold of the shared bytes whenever no call is under way, and what must have come of every request."""

from __future__ import annotations

from collections import Counter

from kvmanager.layout import LOW32, OutputLog, Reason
from kvmanager.pins import Pin
from kvmanager.prefix import Hash, from_words
from tests.faults.simulator.faults import Violation
from tests.faults.simulator.invariants import check_core, check_tokens
from tests.faults.simulator.stores.requests import PAGE_SIZE
from tests.faults.simulator.stores.world import World


class Checks:
    """Called after every death and every few calls."""

    def __init__(self, world: World) -> None:
        self._world = world
        names = Counter(request.pin.key for request in world.requests.values() if request.pin is not None)
        # Where two requests use one name, the one gives way before the other is made.
        self._lone = {key for key, count in names.items() if count == 1}
        self._pinned: set[str] = set()  # keys of pins that were seen, and not taken away since
        self._unpinned: set[str] = set()
        self._wanted: dict[str, set[tuple[int, Hash]]] = {key: set() for key in names}  # pages of a pin, the last hash
        for request in world.requests.values():
            if request.pin is not None:
                whole = len(request.truth.prompt) // PAGE_SIZE
                self._wanted[request.pin.key].add((whole, request.truth.chain(whole, PAGE_SIZE)))
        self._asked: dict[int, int] = {}  # row generation -> the most tokens that were asked for it

    # --- what the executor tells ---

    def asked(self, generation: int, tokens: int) -> None:
        """The row was asked to hold this many tokens, headroom included."""
        self._asked[generation] = max(self._asked.get(generation, 0), tokens)

    def unpinned(self, pin: Pin) -> None:
        self._pinned.discard(pin.key)
        self._unpinned.add(pin.key)

    # --- at any time ---

    def check(self) -> None:
        """Tables, derived state, every row's K/V, every sealed page's K/V, every pin."""
        world = self._world
        check_core(world.core, world.pool, world.truth)
        for row in world.core.live_rows.values():
            most = self._asked.get(row.generation)
            if most is not None and row.length > -(-most // PAGE_SIZE):
                raise Violation(f"row {row.number} holds {row.length} pages, and only {most} tokens were asked for it")
        self._check_pins()

    def _check_pins(self) -> None:
        tables, pinned = self._world.tables, self._world.core.rows.pinned
        for row in pinned.values():
            last = int(tables.row_entry[row.number, row.length - 1]) & LOW32
            if (row.length, from_words(tables.page_hash[last])) not in self._wanted[row.key]:
                raise Violation(f"the pin in row {row.number} is no prompt that was to be pinned")
        if self._pinned - pinned.keys():
            raise Violation("a pinned prefix is gone although nobody unpinned it")
        self._pinned |= pinned.keys() & self._lone

    # --- at the end ---

    def check_finished(self) -> None:
        """Every request came to its undisturbed end, and everything was given back."""
        world = self._world
        outputs = world.ended | {key: record.outputs for key, record in world.records.items()}
        if outputs.keys() | world.refused != world.requests.keys():
            raise Violation("a request was lost")
        for key, logs in outputs.items():
            for index, output in enumerate(logs):
                self._check_ended(key, index, output)
        self.check()
        held = len(world.core.pins.pages)
        if world.core.live_rows or world.core.pages.available + held != world.core.pages.usable:
            raise Violation("pages or rows leaked")
        self._check_pinned(outputs)

    def _check_ended(self, key: str, index: int, output: OutputLog) -> None:
        whole = len(self._world.truth(key, index).tokens) - output.prompt_length
        if not output.ended or (output.reason is not Reason.CANCELLED and output.final_length != whole):
            raise Violation(f"output {index} of {key} never ended")
        check_tokens(self._world.truth(key, index), output)

    def _check_pinned(self, outputs: dict[str, list[OutputLog]]) -> None:
        """A request that ran its course has left its pin."""
        world = self._world
        for key, logs in outputs.items():
            pin = world.requests[key].pin
            if pin is None or not world.prefix_cache or pin.key in self._unpinned:
                continue
            ran = logs[0].reason is Reason.LENGTH and logs[0].prompt_length >= PAGE_SIZE
            if ran and pin.key not in world.core.rows.pinned:
                raise Violation(f"the prefix of {key} was never pinned")
