"""The stand-in for a GPU: its instructions are the manual's, and it shows the mistakes that it is there to show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from kernels.cuda.device import CompilationError, Grid, address
from tests.kernels.cuda.host import SCHEDULES, SHIM, HostDevice, HostKernel, LaunchError

THREADS = 128
Array = npt.NDArray[Any]


def at(array: Array) -> np.uint64:
    return address(array.ctypes.data)


@pytest.fixture(scope="module")
def device(host_cache: Path) -> HostDevice:
    return HostDevice(host_cache, sources=SHIM)


def probe(device: HostDevice, name: str, threads: int = THREADS, shared: int = 0, **defines: int) -> HostKernel:
    return device.kernel("probes.cu", name, defines, threads, shared)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", ml_dtypes.bfloat16), ("f16", np.float16)])
def test_mma_multiplies(device: HostDevice, name: str, dtype: type) -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(shape).astype(dtype) for shape in ((16, 16), (16, 8)))
    d = rng.standard_normal((16, 8)).astype(np.float32)
    expected = d + a.astype(np.float64) @ b.astype(np.float64)
    probe(device, f"multiply_{name}", 32).launch(Grid(1), (at(a), at(b), at(d)))
    np.testing.assert_allclose(d, expected, atol=1e-5)


def test_a_row_of_mma_does_not_depend_on_the_others(device: HostDevice) -> None:
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal(shape).astype(np.float16) for shape in ((16, 16), (16, 8)))
    alone, among = np.zeros((16, 8), np.float32), np.zeros((16, 8), np.float32)
    probe(device, "multiply_f16", 32).launch(Grid(1), (at(a), at(b), at(among)))
    a[np.arange(16) != 5] = np.nan
    probe(device, "multiply_f16", 32).launch(Grid(1), (at(a), at(b), at(alone)))
    np.testing.assert_array_equal(alone[5], among[5])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tiles_go_by_cp_async_and_ldmatrix(device: HostDevice, schedule: str) -> None:
    device.schedule = schedule
    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in ((16, 16), (16, 8)))
    d = np.empty((16, 8), np.float32)
    probe(device, "multiply_tiles", 32).launch(Grid(1), (at(a), at(b), at(d)))
    np.testing.assert_allclose(d, a.astype(np.float64) @ b.astype(np.float64), atol=1e-5)


def test_ldmatrix_deals_out_rows_or_columns(device: HostDevice) -> None:
    matrices = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)
    plain, transposed, pair = (np.zeros((32, n), np.uint32) for n in (4, 4, 2))
    probe(device, "load_matrices", 32).launch(Grid(1), (at(matrices), at(plain), at(transposed), at(pair)))
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        for m in range(4):
            low, high = matrices[m, row, column : column + 2].astype(np.uint32)
            assert plain[lane, m] == low | high << 16
            low, high = matrices[m, column : column + 2, row].astype(np.uint32)
            assert transposed[lane, m] == low | high << 16
    np.testing.assert_array_equal(pair, plain[:, :2])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shuffles_and_ballots_stay_in_their_warp(device: HostDevice, schedule: str) -> None:
    device.schedule = schedule
    values = np.random.default_rng(4).random(64)
    out, votes = np.empty((64, 4)), np.empty(64, np.uint32)
    probe(device, "exchange", 64).launch(Grid(1), (at(values), at(out), at(votes)))
    for warp in range(2):
        mine, lanes = values[warp * 32 :][:32], np.arange(32)
        sources = (
            np.full(32, 5),
            lanes ^ 3,
            np.where(lanes < 2, lanes, lanes - 2),
            np.where(lanes > 27, lanes, lanes + 4),
        )
        for column, source in enumerate(sources):
            np.testing.assert_array_equal(out[warp * 32 :, column][:32], mine[source])
        assert (votes[warp * 32 :][:32] == sum(1 << lane for lane in range(32) if mine[lane] > 0.5)).all()


def test_conversions_round_as_ml_dtypes_does(device: HostDevice) -> None:
    rng = np.random.default_rng(5)
    any_bits = rng.integers(0, 1 << 32, 20_000, dtype=np.uint32).view(np.float32)
    every_e4m3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    halfway = (every_e4m3[:126] + every_e4m3[1:127]) / 2
    near = rng.standard_normal(20_000).astype(np.float32) * np.float32(10) ** rng.integers(-8, 6, 20_000)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 448, 464, 465, 1e30, 65504, 65520, 2.0**-25, 2.0**-10], np.float32)
    values = np.concatenate([any_bits, every_e4m3, halfway, -halfway, near.astype(np.float32), special])
    values = values[~np.isnan(values)]
    out, back = np.empty((len(values), 4), np.uint32), np.empty((len(values), 3), np.float32)
    count = np.int32(len(values))
    probe(device, "convert").launch(Grid(4), (at(values), at(out), at(back), count))

    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    saturated = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    brain = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(out[:, 0], brain.view(np.uint16))
    np.testing.assert_array_equal(out[:, 1], half.view(np.uint16))
    np.testing.assert_array_equal(out[:, 2], saturated.view(np.uint8))
    np.testing.assert_array_equal(out[:, 3] & 0xFFFF, saturated.astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal(out[:, 3] >> 16, (-saturated.astype(np.float32)).astype(np.float16).view(np.uint16))
    for column, narrow in enumerate((brain, half, saturated)):
        np.testing.assert_array_equal(back[:, column], narrow.astype(np.float32))


def test_not_a_number_stays_one(device: HostDevice) -> None:
    values = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(np.float32)
    out, back = np.empty((3, 4), np.uint32), np.empty((3, 3), np.float32)
    probe(device, "convert").launch(Grid(1), (at(values), at(out), at(back), np.int32(3)))
    assert np.isnan(back).all()
    assert (out == [0x7FFF, 0x7FFF, 0x7F, out[0, 3]]).all() and np.isnan(out[:, 3:].view(np.float16)).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_atomics_count_every_thread(device: HostDevice, schedule: str) -> None:
    device.schedule = schedule
    words, total = np.array([0, 0, 0, 100], np.uint32), np.zeros(1, np.uint64)
    probe(device, "count").launch(Grid(5, 2), (at(words), at(total)))
    assert words.tolist() == [10 * THREADS, 0xFFFFFFFF, THREADS - 1, 7]
    assert int(total[0]) == 10 * sum(range(THREADS)) << 32


def rotated(device: HostDevice, barrier: int) -> list[bool]:
    """Whether each schedule gave the right result."""
    values = np.arange(THREADS, dtype=np.float32)
    right = []
    for schedule in SCHEDULES:
        device.schedule = schedule
        out = np.zeros_like(values)
        probe(device, "rotate", BARRIER=barrier).launch(Grid(1), (at(values), at(out), np.int32(3)))
        right.append(bool((out == np.roll(values, -3)).all()))
    return right


def test_a_missing_barrier_shows(device: HostDevice) -> None:
    assert all(rotated(device, 1))
    assert not all(rotated(device, 0))
    assert not all(rotated(device, 2))


def streamed(device: HostDevice, left: int) -> list[bool]:
    data = np.random.default_rng(6).integers(0, 1 << 20, (5, THREADS, 4), dtype=np.uint32)
    right = []
    for schedule in SCHEDULES:
        device.schedule = schedule
        out = np.zeros(THREADS, np.uint32)
        kernel = probe(device, "stream", shared=2 * THREADS * 16, LEFT=left)
        kernel.launch(Grid(1), (at(data), at(out), np.int32(5)))
        right.append(bool((out == np.roll(data[:, :, 0].sum(axis=0), -40)).all()))
    return right


def test_a_missing_wait_shows(device: HostDevice) -> None:
    assert all(streamed(device, 1))
    assert not any(streamed(device, 2))


def added(device: HostDevice, arrival: int) -> list[bool]:
    right = []
    for device.schedule in (*SCHEDULES, *(f"random:{seed}" for seed in range(2, 8))):
        ones, counter, total = np.zeros((6, THREADS), np.uint32), np.zeros(1, np.uint32), np.zeros(1, np.uint32)
        kernel = probe(device, "last_block", ARRIVAL=arrival)
        kernel.launch(Grid(6), (at(ones), at(counter), at(total)))
        right.append(int(total[0]) == ones.size)
    return right


def test_a_block_that_arrives_too_early_shows(device: HostDevice) -> None:
    assert all(added(device, 1))
    assert not all(added(device, 0))


def test_shared_memory_starts_as_poison_in_every_block(device: HostDevice) -> None:
    statics, dynamics = np.zeros((2, 3, THREADS), np.uint32)
    probe(device, "uninitialised", shared=THREADS * 4).launch(Grid(3), (at(statics), at(dynamics)))
    assert (statics == 0xFFFFFFFF).all() and (dynamics == 0xFFFFFFFF).all()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (0, "divergence"),
        (1, "wait for each other for ever"),
        (2, "without the lanes 55555555"),
        (3, "wrote past the 64 bytes"),
        (4, "not multiples of 16"),
    ],
)
def test_mistakes_are_reported(device: HostDevice, mistake: int, message: str) -> None:
    out = np.zeros(THREADS, np.uint32)
    kernel = probe(device, "wrong", shared=64)
    with pytest.raises(LaunchError, match=f"wrong, block.*{message}"):
        kernel.launch(Grid(2), (at(out), np.int32(mistake), np.int32(64)))
    kernel.launch(Grid(2), (at(out), np.int32(9), np.int32(64)))  # and the next launch is sound


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_order_threads_and_blocks(device: HostDevice, schedule: str) -> None:
    device.schedule = schedule
    grid = Grid(2, 3, 2)
    blocks, threads = np.zeros((2, 12 * THREADS), np.uint32)
    counter = np.zeros(1, np.uint32)
    probe(device, "order").launch(grid, (at(counter), at(blocks), at(threads)))
    assert sorted(zip(blocks, threads, strict=True)) == [(b, t) for b in range(12) for t in range(THREADS)]
    ascending = np.array([(b, t) for b in range(12) for t in range(THREADS)])
    seen = np.stack([blocks, threads], axis=1)
    assert (seen == ascending).all() == (schedule == "forward")
    assert (seen == ascending[::-1]).all() == (schedule == "reverse")


def test_arguments_are_checked_against_the_kernel(device: HostDevice) -> None:
    kernel = probe(device, "every_kind", 1)
    word, out = np.array([1], np.uint32), np.zeros(1)
    rest = (np.uint64(2), np.int64(3), np.int32(4), np.uint32(5), np.float32(0.5), np.float64(0.25), at(out))
    kernel.launch(Grid(1), (at(word), *rest))
    assert out[0] == 15.75
    kernel.launch(Grid(0), (at(word), *rest))
    with pytest.raises(TypeError, match="pllii"):
        kernel.launch(Grid(1), (np.int32(1), *rest))
    with pytest.raises(TypeError, match="every_kind takes"):
        kernel.launch(Grid(1), rest)


def test_the_compiler_log_is_in_the_error(host_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.cu").write_text('#include "device.cuh"\nKERNEL(broken, 32, 1)(int* out) { *out = nothing; }\n')
    with pytest.raises(CompilationError, match="nothing"):
        HostDevice(host_cache, sources=tmp_path).kernel("broken.cu", "broken", {}, 32)
