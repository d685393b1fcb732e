"""What containers cost: prints the part of docs/measurements.md about them.

One deployment of compose.yaml at a time, on images that are built first, each round from `down` to `down`. Medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Final

from tests.compose import engine
from tests.compose.engine import Deployment, inspect

_VERSION: Final = "0"
_IDLE_SECONDS: Final = 30.0
_ROUNDS: Final = 5
_MEBIBYTE: Final = 1 << 20
_MEGABYTE: Final = 1_000_000


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else _ROUNDS
    if reason := engine.why_not():
        print(f"scripts/bench/containers: {reason}", file=sys.stderr)
        return 1
    for target in engine.TARGETS.values():
        engine.build(target, _VERSION)
    versions = {f"PAGEHOLD_{name}_VERSION": _VERSION for name in ("FRONTEND", "KVMANAGER", "EXECUTOR")}
    deployment = Deployment(**versions)
    try:
        _measure(deployment, rounds)
    finally:
        deployment.down()
    return 0


def _measure(deployment: Deployment, rounds: int) -> None:
    first = _seconds(deployment.up)
    starts, back = [], {service: list[float]() for service in engine.TARGETS}
    for _ in range(rounds):
        deployment("down")
        starts.append(_seconds(deployment.up))
        for service, times in back.items():
            times.append(_seconds(lambda service=service: _die(deployment, service)))  # type: ignore[misc]
            deployment.await_ready()
    deployment("down")
    deployment.up()
    before = {service: _processor_seconds(deployment, service) for service in engine.TARGETS}
    time.sleep(_IDLE_SECONDS)
    print(f"- `up` to ready: {statistics.median(starts):.1f} s; {first:.1f} s the first time, with the model converted")
    print("\n| image | size | above its base | idle memory | of it shared | idle processor | killed to ready again |")
    print("|---|---|---|---|---|---|---|")
    base = _base_bytes()
    for service, target in engine.TARGETS.items():
        size = int(inspect(f"{engine.IMAGES}/{target}:{_VERSION}")["Size"])
        memory, shared = _memory_bytes(deployment, service)
        idle = (_processor_seconds(deployment, service) - before[service]) / _IDLE_SECONDS
        print(
            f"| {target} | {size / _MEGABYTE:.0f} MB | {(size - base) / _MEGABYTE:.0f} MB "
            f"| {memory / _MEBIBYTE:.0f} MiB | {shared / _MEBIBYTE:.0f} MiB | {100 * idle:.1f} % of one "
            f"| {statistics.median(back[service]):.1f} s |"
        )
    print(f"\nMedians of {rounds}; the base has {base / _MEGABYTE:.0f} MB.")
    deployment("down")
    print(_waiting(deployment))


def _waiting(deployment: Deployment) -> str:
    """What those take that wait for others, and how often the engine starts one that cannot run."""
    waiting = ("executor", "frontend")
    deployment("up", "--detach", "--no-build", "--no-deps", *waiting)
    time.sleep(_IDLE_SECONDS)
    before = {service: _processor_seconds(deployment, service) for service in waiting}
    time.sleep(_IDLE_SECONDS)
    shares = [(_processor_seconds(deployment, one) - before[one]) / _IDLE_SECONDS for one in waiting]
    deployment("down")
    missing = {"PAGEHOLD_MODEL": "/models/none.gguf"}
    deployment("up", "--detach", "--no-build", "--no-deps", "executor", **missing)
    time.sleep(2 * _IDLE_SECONDS)
    starts = int(inspect(deployment.container("executor"))["RestartCount"])
    return (
        f"An executor without a manager takes {100 * shares[0]:.1f} % of a processor, a frontend without an executor "
        f"{100 * shares[1]:.1f} %; one whose model is missing is started again {starts} times in the first minute."
    )


def _seconds(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


def _die(deployment: Deployment, service: str) -> None:
    """The container's main process, by SIGKILL; until its successor's component is ready."""
    before = deployment.main_pid(service)
    engine.kill(before)
    while deployment.main_pid(service) == before:
        pass
    deployment.await_component(service)


def _base_bytes() -> int:
    """Of what an image has below Pagehold's own first layer."""
    name = f"{engine.IMAGES}/frontend:{_VERSION}"
    said = engine.run("docker", "history", "--no-trunc", "--human=false", "--format", "{{.Size}} {{.CreatedBy}}", name)
    own = sum(int(line.split()[0]) for line in said.splitlines() if "/opt/pagehold" in line or "useradd" in line)
    return int(inspect(name)["Size"]) - own


def _memory_bytes(deployment: Deployment, service: str) -> tuple[int, int]:
    """As the engine counts, without files that the kernel could drop; and what of it is in the shared files."""
    one = _cgroup(deployment, service)
    numbers = {
        name: int(value) for name, value in (line.split() for line in one["memory.stat"].splitlines() if " " in line)
    }
    usage = int(one["memory.usage_in_bytes" if "memory.usage_in_bytes" in one else "memory.current"])
    inactive = numbers.get("total_inactive_file", numbers.get("inactive_file", 0))
    return usage - inactive, numbers.get("total_shmem", numbers.get("shmem", 0))


def _processor_seconds(deployment: Deployment, service: str) -> float:
    one = _cgroup(deployment, service)
    if "cpuacct.usage" in one:
        return int(one["cpuacct.usage"]) / 1e9
    (line,) = (line for line in one["cpu.stat"].splitlines() if line.startswith("usage_usec"))
    return int(line.split()[1]) / 1e6


def _cgroup(deployment: Deployment, service: str) -> dict[str, str]:
    """The files of the container's own group, version 1 or 2, as they are inside."""
    names = "memory/memory.stat memory/memory.usage_in_bytes cpuacct/cpuacct.usage memory.stat memory.current cpu.stat"
    found = {}
    for name in names.split():
        command = ("docker", "exec", deployment.container(service), "cat", f"/sys/fs/cgroup/{name}")
        text = engine.run(*command, check=False)
        if "No such file" not in text:
            found[name.rpartition("/")[2]] = text
    return found


if __name__ == "__main__":
    sys.exit(main())
