"""The release after this one, made from this one: every message has a field that nobody here knows."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any, Final

from pagehold.runtime.protocol import PROTOCOL
from tests.conftest import to_flags

HERE: Final = Path(__file__).parents[2]
_PACKAGES: Final = ("pagehold", "kvmanager", "kernels", "services")
_SET_FIELDS: Final = """
def _next_release(kind):
    def fill(message):
        message.from_the_next_release = "new"
        for field, value in message.ListFields():
            if field.message_type and hasattr(field.message_type._concrete_class, "from_the_next_release"):
                for one in value if field.is_repeated else [value]:
                    fill(one)

    def serialize(message):
        fill(message)
        return kind.SerializeToString(message)

    return serialize

"""


def make_next(folder: Path) -> Path:
    """Copies the sources to `folder`, changed. Returns the folder."""
    for name in _PACKAGES:
        shutil.copytree(HERE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*_pb2*"))
    protos = shutil.copytree(HERE / "protos", folder / "protos")
    files = sorted(protos.rglob("*.proto"))
    for path in files:
        path.write_text(
            re.sub(r"(?m)^(\s*message \w+ \{)", r"\1 string from_the_next_release = 1000; ", path.read_text())
        )
    include = resources.files("grpc_tools") / "_proto"
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{protos}", f"-I{include}", *outputs, *map(str, files)]
    subprocess.run(command, check=True, timeout=60)
    for path in folder.rglob("*_pb2_grpc.py"):
        text, count = re.subn(r"=(\S+_pb2\.\w+)\.SerializeToString", r"=_next_release(\1)", path.read_text())
        assert count, f"no message in {path.name}"
        path.write_text(text.replace("\nclass ", _SET_FIELDS + "\nclass ", 1))
    version = folder / "pagehold" / "runtime" / "protocol.py"
    text, count = re.subn(r"(?m)^PROTOCOL: Final = \d+", f"PROTOCOL: Final = {PROTOCOL + 1}", version.read_text())
    assert count == 1
    version.write_text(text)
    return folder


class Process:
    """A bare component of a release, in the foreground of its own."""

    def __init__(self, release: Path, component: str, log: Path, **flags: Any) -> None:
        with log.open("a") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "services.cli.main", component, *to_flags(flags)],
                cwd=release,
                stdout=output,
                stderr=output,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self._process.terminate()
        return self._process.wait(30)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
