"""compose.yaml as a text: its schema, and what every service of ours must have. Containers: tests/compose."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from pagehold.runtime.settings import FrontendSettings, KvManagerSettings, RunExecutorSettings, Settings, parse_bytes
from services.cli.main import COMMANDS

ROOT: Final = Path(__file__).parents[2]
SETTINGS: Final[dict[str, type[Settings]]] = {
    "frontend": FrontendSettings,
    "kvmanager": KvManagerSettings,
    "executor": RunExecutorSettings,
}


def compose() -> dict[str, Any]:
    """With all variables at their defaults."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / "compose.yaml").read_text())
    assert "${" not in text, "every variable has a default"
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def ours() -> list[tuple[str, dict[str, Any]]]:
    return [(name, one) for name, one in compose()["services"].items() if one.get("command", [""])[0] == "run"]


def seconds(text: str) -> float:
    assert text.endswith("s")
    return float(text[:-1])


def test_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "service"), ours())
def test_every_component_is_kept_and_confined(name: str, service: dict[str, Any]) -> None:
    component = service["command"][1]
    assert service["command"] == ["run", component]
    assert service["restart"] == "unless-stopped" and service["init"] is True
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"] and service["user"] == "10001:10001"
    assert service["mem_limit"] and service["pids_limit"]
    assert service["healthcheck"]["test"] == ["CMD", "pagehold", "health", component] and "health" in COMMANDS
    # Nothing waits for anything to be started.
    assert "depends_on" not in service and "pid" not in service and "ipc" not in service


@pytest.mark.parametrize(("name", "service"), ours())
def test_what_is_set_is_known(name: str, service: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kind = SETTINGS[service["command"][1]]
    known = {f"PAGEHOLD_{field.upper()}" for one in SETTINGS.values() for field in one.model_fields}
    for variable, value in service["environment"].items():
        if not variable.startswith("PAGEHOLD_"):
            continue
        assert variable in known, f"{name}: {variable}"
        if value is not None:
            monkeypatch.setenv(variable, str(value))
    settings = kind(_cli_parse_args=[])  # type: ignore[call-arg]
    if isinstance(settings, FrontendSettings):
        # Its supervisor gives it ten more.
        assert seconds(service["stop_grace_period"]) > settings.drain_seconds + 10
    else:
        assert seconds(service["stop_grace_period"]) > 10


def test_memory_of_the_shared_files_fits_its_owner() -> None:
    found = compose()
    (size,) = re.findall(r"size=(\w+)", found["volumes"]["shared"]["driver_opts"]["o"])
    shared, limit = parse_bytes(size), parse_bytes(found["services"]["kvmanager"]["mem_limit"])
    pool = parse_bytes(found["services"]["executor"]["environment"]["PAGEHOLD_KV_MEMORY"])
    records = parse_bytes(found["services"]["kvmanager"]["environment"]["PAGEHOLD_RECORD_QUOTA"])
    assert isinstance(shared, int) and isinstance(limit, int) and isinstance(pool, int) and isinstance(records, int)
    assert pool + records < shared < limit


def test_a_profile_is_a_whole_deployment() -> None:
    services = compose()["services"]

    def up(profile: str) -> set[str]:
        return {name for name, one in services.items() if profile in one.get("profiles", [profile])}

    host, device = {"frontend", "kvmanager", "executor"}, {"frontend", "kvmanager-cuda", "executor-cuda"}
    assert up("cpu") == host and up("gpu") == device
    assert up("observability") == host | {"prometheus", "grafana"}
    assert up("gpu-observability") == device | {"prometheus", "grafana"}
    assert "COMPOSE_PROFILES=cpu\n" in (ROOT / ".env").read_text()


def test_both_ends_of_a_pool_see_one_gpu() -> None:
    services = compose()["services"]
    found = [services[name]["deploy"]["resources"]["reservations"] for name in ("kvmanager-cuda", "executor-cuda")]
    assert found[0] == found[1] == {"devices": [{"driver": "nvidia", "device_ids": ["0"], "capabilities": ["gpu"]}]}
    # Legacy IPC needs a PID namespace that both share, and both would have to be restarted together.
    for name in ("kvmanager-cuda", "executor-cuda"):
        assert services[name]["environment"]["PAGEHOLD_POOL"] == "vmm"


def test_images_are_targets() -> None:
    targets = set(re.findall(r"(?m)^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text()))
    for name, service in ours():
        # Each can be built: an image that is shared is not looked for in a registry by who does not build it.
        image = service["image"].rpartition("/")[2].partition(":")[0]
        assert image in targets and service["build"]["target"] == image, name


def test_torch_settles_the_release_of_cudas_libraries() -> None:
    """Else pip, where it is Debian 12's, loads every torch there is in search of one that goes with the newest."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["cuda13"]
    assert wanted[0].startswith("torch")
    (line,) = re.findall(r"(?m)^RUN (.*requirements-cuda13.txt)$", (ROOT / "Dockerfile").read_text())
    assert line.startswith("xargs --max-args=1 ")  # one after the other


def test_what_is_mounted_is_there() -> None:
    found = compose()
    for name, service in found["services"].items():
        for one in service["volumes"]:
            source = one.partition(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in found["volumes"], f"{name}: {one}"
    assert (ROOT / found["secrets"]["hf_token"]["file"]).read_text() == ""
