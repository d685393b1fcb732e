"""Deaths of everything, in every order: `python -m tests.faults.orders [ROUNDS] [SEED]` runs more of them."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
import sys
import time
from itertools import permutations
from typing import Final

from pagehold.runtime.process import is_alive
from pagehold.runtime.progress import read_progress
from pagehold.runtime.statedir import StateDir
from tests.conftest import Stack, running_stacks
from tests.faults.streams import Load, mixed, undisturbed
from tests.faults.test_kill import COMPONENTS, up_again

SUPERVISOR: Final = "supervisor"
ORDERS: Final = tuple(permutations((*COMPONENTS, SUPERVISOR)))
_LONGEST_GAP: Final = 0.4  # seconds: about what a component needs to be there again, so that some die half-started
_PATIENCE: Final = 30.0
_TOKENS: Final = 120


def kill(stack: Stack, component: str, dead: set[int]) -> None:
    """As soon as there is one that was not killed yet, ready or not. dead: those that were."""
    give_up = time.monotonic() + _PATIENCE
    while True:
        view = read_progress(StateDir(stack.state_dir).progress(component))
        if view is not None and view.pid not in dead and is_alive(view):
            break
        assert time.monotonic() < give_up, f"{component} was not started again"
        time.sleep(0.005)
    dead.add(view.pid)
    os.kill(view.pid, signal.SIGKILL)


async def round_of(stack: Stack, chance: random.Random, order: tuple[str, ...], number: int) -> None:
    """One order of deaths under load. Raises AssertionError when a stream is not as if nothing had been."""
    messages = mixed(3, _TOKENS)
    for message in messages:
        message.request_id += f"-round-{number}"
    reference = await undisturbed(stack.address, messages)
    load = Load(stack.address, messages, resume=True)
    await load.reach(chance.randrange(1, 30))
    dead: set[int] = set()
    for component in order:
        if component == SUPERVISOR:
            stack.process.kill()  # its children die with it
            stack.process.wait()
            await asyncio.to_thread(up_again, stack)
        else:
            await asyncio.to_thread(kill, stack, component, dead)
        await asyncio.sleep(chance.random() * _LONGEST_GAP)
    assert await load.answers() == reference, f"{order}"


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else len(ORDERS)
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else secrets.randbits(32)
    chance = random.Random(seed)
    print(f"{rounds} rounds, seed {seed}", flush=True)
    with running_stacks() as start:
        stack = start()
        for number in range(rounds):
            order = ORDERS[number % len(ORDERS)]
            print(number, *order, flush=True)
            asyncio.run(round_of(stack, chance, order, number))
    print("every stream as if nothing had been")
    return 0


if __name__ == "__main__":
    sys.exit(main())
