"""The thread pool, in a program of its own, and an engine's threads when there is nothing to do."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tests.kernels.test_bit_exact import sequence
from tests.kernels.variants import GROUPED, SOURCE, Pages, Variant, as_chunks, random_tensors


def run_program(name: str, folder: Path, *sources: Path) -> None:
    program = folder / name
    options = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-pthread", f"-I{SOURCE}")
    own = Path(__file__).with_name(f"{name}.cpp")
    subprocess.run(["c++", *options, own, *sources, "-o", program], check=True, capture_output=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    print(done.stdout)
    assert done.returncode == 0, done.stdout


def test_no_piece_is_lost_or_repeated(tmp_path: Path) -> None:
    run_program("pool_stress", tmp_path, SOURCE / "threads.cpp")


def test_fewer_threads_where_processors_are_taken(tmp_path: Path) -> None:
    run_program("crew_trials", tmp_path)


def test_an_idle_engine_costs_nothing() -> None:
    model = Variant("portable", None).model(GROUPED, random_tensors(GROUPED), "float32", threads=4)
    try:
        pages = Pages(model, GROUPED, "float32", 50, 16)
        lane = sequence(pages)
        model.logits(as_chunks([lane.chunk(0, 100)]))
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.01
    finally:
        model.close()
