"""The package build's own part: generated protos and the native CPU library, made in place.

Both are ignored by git and land in the wheel; an editable install uses them where they are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_COMPILERS = ("c++", "g++", "clang++")


class PageholdBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        _generate_protos(root)
        _compile_library(root)
        build_data["pure_python"] = False
        # No extension module: one wheel serves every Python 3 on this platform.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"


def _generate_protos(root: Path) -> None:
    from grpc_tools import protoc

    protos = root / "protos"
    files = sorted(str(path.relative_to(protos)) for path in protos.rglob("*.proto"))
    include = Path(protoc.__file__).parent / "_proto"
    outputs = [f"--{kind}_out={root}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{protos}", f"-I{include}", *outputs, *files]):
        sys.exit("pagehold: the .proto files could not be compiled")


def _compile_library(root: Path) -> None:
    if not (os.environ.get("CXX") or any(map(shutil.which, _COMPILERS))):
        sys.exit("pagehold: a C++17 compiler is needed: install g++ 9 or newer (such as apt install g++) or clang++")
    build = root / "build" / "cpu"
    source = root / "kernels" / "cpu"
    # A compiler's package does not bring make; the build's own requirements have Ninja, this time in this place.
    ninja = () if shutil.which("make") else ("-GNinja", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}")
    _run("cmake", "-S", str(source), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *ninja)
    _run("cmake", "--build", str(build), "--parallel")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"pagehold: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
