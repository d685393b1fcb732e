"""What the serving processes are made of: no torch, no transformers, no CuPy, and nobody else's insides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Stack

HEAVY = ("torch", "transformers", "cupy", "gguf", "safetensors")
ALLOWED = {
    "services.frontend.main": ("services.frontend", "pagehold"),
    "kvmanager.main": ("kvmanager", "pagehold"),
    "services.executor.main": ("services.executor", "pagehold", "kvmanager", "kernels"),
}
OURS = ("services", "pagehold", "kvmanager", "kernels")


@pytest.mark.parametrize("module", ALLOWED)
def test_imports(module: str) -> None:
    code = f"import sys, {module}; print('\\n'.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert module in loaded
    assert not [name for name in loaded if name.split(".")[0] in HEAVY]
    allowed = (*ALLOWED[module], "services")
    strangers = [
        name
        for name in loaded
        if name.split(".")[0] in OURS
        and not any(name == prefix or name.startswith(prefix + ".") for prefix in allowed[:-1])
        and name != "services"
    ]
    assert not strangers


@pytest.mark.stack
@pytest.mark.parametrize("component", ["frontend", "kvmanager", "executor"])
def test_what_a_running_process_has_mapped(stack: Stack, component: str) -> None:
    """Native parts are seen in its memory, whenever they came: `import` at the first request is found too."""
    maps = Path(f"/proc/{stack.pids()[component]}/maps").read_text()
    assert "grpc" in maps, "the maps are those of a serving process"
    for library in ("libtorch", "libc10", "cupy", "libcudart", "safetensors"):
        assert library not in maps
    if component != "executor":
        assert "kernels/cpu" not in maps
    if component != "frontend":
        assert "tokenizers" not in maps
