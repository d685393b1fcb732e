"""Small made-up results."""

from __future__ import annotations

from peers_lib.bound import Shape
from peers_lib.machine import Machine
from peers_lib.report import Entrant, Load, Outcome, Report, Start
from peers_lib.scenario import Group
from peers_lib.trace import Arrival, Figures, Trace

MACHINE = Machine(
    cpu="A Processor",
    processors=2,
    instruction_sets=("avx2", "fma"),
    memory_gib=16.0,
    commit="0123456789ab",
    python="3.11.7",
    versions={"pagehold": "0.1.0", "torch": "2.13.0"},
    load_average=0.5,
    read_gb_per_s=20.0,
    gemm_float32_gflops=100.0,
    gemm_bfloat16_gflops=None,
)

SHAPE = Shape(layers=2, hidden=8, intermediate=16, heads=4, kv_heads=2, head_dim=2, vocab=32)
LOADS = {"one": Load("1 request", Group.BATCH, [64], 100)}


def trace(name: str, *arrivals: tuple[float, int], submitted: float = 0.0, tokens: tuple[int, ...] = ()) -> Trace:
    count = sum(tokens for _, tokens in arrivals)
    return Trace(name, submitted, tuple(Arrival(at, tokens) for at, tokens in arrivals), tokens or tuple(range(count)))


def figures(speed: float, first: float = 0.1, between: float = 0.01) -> Figures:
    return Figures(
        requests=2,
        tokens=100,
        seconds=100 / speed,
        tokens_per_second=speed,
        first_p50=first,
        first_p99=2 * first,
        between_p50=between,
        between_p99=2 * between,
    )


def entrant(engine: str, dtype: str, reason: str = "", flags: tuple[str, ...] = ()) -> Entrant:
    return Entrant(
        name=" ".join((engine, dtype, *flags)),
        engine=engine,
        dtype=dtype,
        flags=flags,
        note="as it is",
        version="1.2.3",
        reason=reason,
        first_start=None if reason else 4.0,
    )


def outcome(
    number: int,
    name: str,
    speed: float | None,
    peak: int = 100 << 20,
    same: float | None = None,
    scenario: str = "one",
    between: float = 0.01,
) -> Outcome:
    """No speed: it failed."""
    return Outcome(
        round=number,
        entrant=name,
        scenario=scenario,
        figures=None if speed is None else figures(speed, between=between),
        peak_bytes=peak,
        others=0.25,
        agreement=same,
        reason="no end of one within 5 s" if speed is None else "",
    )


def report(
    entrants: list[Entrant],
    outcomes: list[Outcome],
    loads: dict[str, Load] | None = None,
    started: str = "2026-01-02T03:04:05+00:00",
) -> Report:
    return Report(
        command="scripts/bench/peers --rounds 3",
        started=started,
        machine=MACHINE,
        load_average_after=1.5,
        model="model.gguf",
        shape=SHAPE,
        kv_memory=2 << 30,
        rounds=3,
        scenarios=LOADS if loads is None else loads,
        entrants=entrants,
        starts=[Start(1, each.name, 2.5, 90 << 20, 0.7) for each in entrants if not each.reason],
        outcomes=outcomes,
    )
