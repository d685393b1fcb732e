"""The units: understood by systemd and by Pagehold; and their command lines bring up a stack that answers."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagehold.runtime.progress import State, read_progress
from pagehold.runtime.settings import RunExecutorSettings, RunFrontendSettings, RunKvManagerSettings, SupervisorSettings
from services.cli.await_ready import await_ready
from services.supervisor.child import EXIT_CONFIG
from tests.conftest import COMMAND, START_SECONDS, STOP_SECONDS, free_port
from tests.deploy.commands import read_shared
from tests.faults.streams import Load, request, undisturbed

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
PROGRAM = "/opt/pagehold/bin/pagehold"
MANAGER, EXECUTOR, FRONTEND = "pagehold-kvmanager.service", "pagehold-executor.service", "pagehold-frontend@.service"
SERVICES = (MANAGER, EXECUTOR, FRONTEND)
SUPERVISOR_SECONDS = 10.0  # beyond a frontend's drain, until its supervisor kills it


def read(unit: str, instance: str = "1") -> dict[str, list[str]]:
    """Each setting of a unit with all its values; %i is the instance."""
    found = defaultdict(list)
    for line in (FOLDER / unit).read_text().splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found[name].append(value.replace("%i", instance))
    return found


def environment(unit: str) -> dict[str, str]:
    """What the process has: the unit's own, and what is set in the file."""
    lines = [word for line in read(unit)["Environment"] for word in shlex.split(line)]
    lines += [line for line in (FOLDER / "pagehold.env").read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def words(unit: str, instance: str = "1") -> list[str]:
    """The command line behind the program."""
    (line,) = read(unit, instance)["ExecStart"]
    known = environment(unit)
    program, *found = shlex.split(re.sub(r"\$\{(\w+)\}", lambda match: known[match[1]], line))
    assert program == PROGRAM
    return found


def settings(unit: str, instance: str = "1") -> SupervisorSettings:
    return read_shared(words(unit, instance), environment(unit))


def test_systemd_understands_them(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd here")
    for path in [*FOLDER.glob("*.service"), *FOLDER.glob("*.target"), *FOLDER.glob("*.mount")]:
        (tmp_path / path.name).write_text(path.read_text().replace(PROGRAM, "/bin/true"))
    for service in (MANAGER, EXECUTOR):
        (tmp_path / f"{service}.d").mkdir()
        shutil.copy(FOLDER / "gpu.conf", tmp_path / f"{service}.d")
    names = ["pagehold.target", "run-pagehold.mount", MANAGER, EXECUTOR, FRONTEND.replace("@", "@1")]
    done = subprocess.run(
        [analyze, "verify", "--man=no", *(str(tmp_path / name) for name in names)],
        capture_output=True,
        text=True,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_command_line_is_understood() -> None:
    assert {unit: type(settings(unit)) for unit in SERVICES} == {
        MANAGER: RunKvManagerSettings,
        EXECUTOR: RunExecutorSettings,
        FRONTEND: RunFrontendSettings,
    }


def test_every_variable_of_the_file_is_some_components_flag() -> None:
    fields = {name for unit in SERVICES for name in type(settings(unit)).model_fields}
    text = (FOLDER / "pagehold.env").read_text() + (FOLDER / "gpu.conf").read_text()
    for name in re.findall(r"^#? ?(?:Environment=)?PAGEHOLD_(\w+)=", text, re.MULTILINE):
        assert name.lower() in fields, name


def test_components_meet_and_ports_differ() -> None:
    manager, executor = settings(MANAGER), settings(EXECUTOR)
    assert manager.state_dir == executor.state_dir
    taken = [manager.metrics_listen, executor.metrics_listen]
    for number in "123456789":
        frontend = settings(FRONTEND, number)
        assert isinstance(frontend, RunFrontendSettings)
        assert frontend.executor == f"unix:{executor.state_dir}/executor.sock"
        taken += [frontend.listen, frontend.metrics_listen]
        assert frontend.state_dir != executor.state_dir
    assert len(set(taken)) == len(taken) == 20


@pytest.mark.parametrize("unit", SERVICES)
def test_folders_are_the_units_and_outlive_a_restart(unit: str) -> None:
    found = read(unit)
    assert [f"/run/{name}" for name in found["RuntimeDirectory"]] == [str(settings(unit).state_dir)]
    assert found["RuntimeDirectoryMode"] == ["0700"]
    # A frontend's folder holds nothing that its next one needs.
    assert found["RuntimeDirectoryPreserve"] == (["restart"] if unit == FRONTEND else ["yes"])
    if unit != FRONTEND:
        where = read("run-pagehold.mount")["Where"]
        assert found["RequiresMountsFor"] == where == [str(settings(unit).state_dir)]


@pytest.mark.parametrize("unit", SERVICES)
def test_it_ends_and_comes_again_as_it_should(unit: str) -> None:
    found, wanted = read(unit), settings(unit)
    assert found["Restart"] == ["always"]
    assert found["RestartPreventExitStatus"] == [str(EXIT_CONFIG)]
    # Otherwise the component gets a second SIGTERM with the supervisor's, and does not drain.
    assert found["KillMode"] == ["mixed"]
    drain = wanted.drain_seconds if isinstance(wanted, RunFrontendSettings) else 0.0
    assert float(found["TimeoutStopSec"][0]) > drain + SUPERVISOR_SECONDS
    assert found["PartOf"] == ["pagehold.target"]


def test_components_stop_before_those_they_need() -> None:
    assert EXECUTOR in read(FRONTEND)["After"][0].split()
    assert MANAGER in read(EXECUTOR)["After"][0].split()


class Units:
    """The services' command lines as processes, in a folder in place of /run, on free ports."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self.state_dir = run / "pagehold"
        self.address = f"127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, unit: str) -> None:
        found = [word.replace("/run/", f"{self._run}/") for word in words(unit)]
        for flag, value in (("--listen", self.address), ("--metrics-listen", f"127.0.0.1:{free_port()}")):
            if flag in found:
                found[found.index(flag) + 1] = value
        ours = {name: value for name, value in environment(unit).items() if name.startswith("PAGEHOLD_")}
        small = {"PAGEHOLD_KV_MEMORY": "256MiB", "PAGEHOLD_FRONTENDS": "2"}
        process = subprocess.Popen([*COMMAND, *found], env={**os.environ, **ours, **small}, umask=0o077)
        self.processes[unit] = process

    def stop(self, unit: str) -> int:
        process = self.processes.pop(unit)
        process.terminate()
        return process.wait(STOP_SECONDS)


@pytest.fixture
def units() -> Iterator[Units]:
    with tempfile.TemporaryDirectory(prefix="pagehold-test-", dir="/dev/shm") as run:
        made = Units(Path(run))
        try:
            yield made
        finally:
            for process in made.processes.values():
                process.kill()  # its component dies with it
                process.wait()


@pytest.mark.stack
async def test_the_command_lines_bring_up_a_stack_that_answers(units: Units) -> None:
    for unit in (FRONTEND, EXECUTOR, MANAGER):  # all wait for each other
        units.start(unit)
    assert await_ready(units.address, units.processes[FRONTEND].pid, START_SECONDS)
    # Of two that start at the same time, one may be asked a moment before it can answer.
    folder = units.state_dir.with_name("pagehold-frontend-1")
    deadline = time.monotonic() + 30
    while [_is_ready(folder / f"{name}.progress") for name in ("frontend", "frontend-2")] != [True, True]:
        assert time.monotonic() < deadline, "two frontends share the port"
        time.sleep(0.05)

    messages = [request(number, tokens=300) for number in range(2)]
    reference = await undisturbed(units.address, messages)

    for number, message in enumerate(messages):
        message.request_id = f"again-{number}"
    load = Load(units.address, messages)
    for tokens, unit in ((5, EXECUTOR), (25, MANAGER)):
        await load.reach(tokens)
        # The whole service at once; systemd starts it again.
        units.processes[unit].send_signal(signal.SIGKILL)
        units.processes[unit].wait()
        units.start(unit)
    assert await load.answers() == reference
    assert [units.stop(unit) for unit in (FRONTEND, EXECUTOR, MANAGER)] == [0, 0, 0]
    assert (units.state_dir / "tables").exists(), "what the next start goes on from"


def _is_ready(path: Path) -> bool:
    view = read_progress(path)
    return view is not None and view.state is State.READY
