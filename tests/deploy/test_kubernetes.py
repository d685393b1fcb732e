"""The manifests: valid for Kubernetes, understood by Pagehold, and in agreement with each other."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import pagehold
from pagehold.runtime.settings import (
    RunExecutorSettings,
    RunFrontendSettings,
    RunKvManagerSettings,
    SupervisorSettings,
    parse_bytes,
)
from pagehold.v1 import inference_pb2
from tests.deploy.commands import read_component
from tests.deploy.kustomize import build, containers

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
OVERLAYS = sorted(path.name for path in (FOLDER / "overlays").iterdir())
SUPERVISOR_SECONDS = 10.0  # beyond a frontend's drain, until its supervisor kills it


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return build(FOLDER / "overlays" / request.param)


def find(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = (one for one in objects if (one["kind"], one["metadata"]["name"]) == (kind, name))
    return found


def pod(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    spec: dict[str, Any] = find(objects, kind, name)["spec"]["template"]["spec"]
    return spec


def all_containers(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {container["name"]: container for one in objects for container in containers(one)}


def settings(container: dict[str, Any]) -> SupervisorSettings:
    environment = {one["name"]: one["value"] for one in container.get("env", [])}
    return read_component(container["args"], environment)


def quantity(text: str) -> int:
    """Kubernetes' Mi and Gi."""
    found = parse_bytes(f"{text}B")
    assert isinstance(found, int)
    return found


def test_there_are_overlays_for_both_devices() -> None:
    assert OVERLAYS == ["cpu", "gpu"]


def test_every_object_is_valid(objects: list[dict[str, Any]]) -> None:
    for one in objects:
        kubernetes_validate.validate(one, "1.37", strict=True)


def test_a_wrong_object_is_found(objects: list[dict[str, Any]]) -> None:
    """The check itself."""
    wrong = find(objects, "Deployment", "frontend")
    wrong["spec"]["template"]["spec"]["terminationGracePeriod"] = 60
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_builds_the_same(overlay: str) -> None:
    command = shutil.which("kubectl")
    if command is None or subprocess.run([command, "kustomize", "--help"], capture_output=True).returncode:
        pytest.skip("no kubectl with kustomize here")
    done = subprocess.run([command, "kustomize", FOLDER / "overlays" / overlay], capture_output=True, check=True)

    def in_order(objects: list[dict[str, Any]]) -> list[str]:
        return sorted(json.dumps(one, sort_keys=True) for one in objects)

    assert in_order(list(yaml.safe_load_all(done.stdout))) == in_order(build(FOLDER / "overlays" / overlay))


def test_every_command_line_is_understood(objects: list[dict[str, Any]]) -> None:
    found = {name: type(settings(container)) for name, container in all_containers(objects).items()}
    assert found == {
        "frontend": RunFrontendSettings,
        "kvmanager": RunKvManagerSettings,
        "executor": RunExecutorSettings,
    }


def test_images_are_those_of_this_release(objects: list[dict[str, Any]]) -> None:
    for container in all_containers(objects).values():
        name, _, tag = container["image"].partition(":")
        assert name.removeprefix("pagehold/") in ("frontend", "kvmanager", "executor-cpu", "executor-cuda")
        assert tag == pagehold.__version__


def test_frontends_find_the_executor(objects: list[dict[str, Any]]) -> None:
    found = all_containers(objects)
    frontend, executor = settings(found["frontend"]), settings(found["executor"])
    assert isinstance(frontend, RunFrontendSettings) and isinstance(executor, RunExecutorSettings)
    service = find(objects, "Service", "executor")
    assert frontend.executor == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert executor.executor_listen is not None
    assert port_named(found["executor"], "grpc") == int(executor.executor_listen.rpartition(":")[2])
    assert service["spec"]["publishNotReadyAddresses"]
    public = find(objects, "Service", "pagehold")
    assert public["spec"]["clusterIP"] == "None"
    assert public["spec"]["ports"][0]["port"] == port_named(found["frontend"], "grpc")
    assert port_named(found["frontend"], "grpc") == int(frontend.listen.rpartition(":")[2])


def port_named(container: dict[str, Any], name: str) -> int:
    (found,) = (one["containerPort"] for one in container["ports"] if one["name"] == name)
    return int(found)


def test_selectors_meet_their_pods(objects: list[dict[str, Any]]) -> None:
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in objects if containers(one)]
    selectors = [
        one["spec"].get("selector", one["spec"].get("podSelector"))
        for one in objects
        if one["kind"] in ("Service", "NetworkPolicy", "PodDisruptionBudget", "Deployment", "StatefulSet")
    ]
    assert len(selectors) == 7
    for selector in selectors:
        wanted = selector.get("matchLabels", selector)
        assert any(wanted.items() <= one.items() for one in labels), wanted


def test_manager_and_executor_share_memory_and_nothing_overflows(objects: list[dict[str, Any]]) -> None:
    spec, found = pod(objects, "StatefulSet", "executor"), all_containers(objects)
    volumes = {one["name"]: one["emptyDir"] for one in spec["volumes"]}
    manager, executor = settings(found["kvmanager"]), settings(found["executor"])
    assert isinstance(manager, RunKvManagerSettings) and isinstance(executor, RunExecutorSettings)
    assert manager.state_dir == executor.state_dir
    for name in ("kvmanager", "executor"):
        mounts = {one["name"]: one["mountPath"] for one in found[name]["volumeMounts"]}
        # Not the volume itself, which belongs to root.
        assert str(manager.state_dir.parent) == mounts["shared"]
    assert all(one["medium"] == "Memory" for one in volumes.values())
    size = quantity(volumes["shared"]["sizeLimit"])
    on_host = executor.kv_memory or 0 if executor.device == "cpu" else 0
    assert on_host + manager.record_quota < size
    assert size < quantity(found["kvmanager"]["resources"]["limits"]["memory"])


def test_as_many_threads_as_processors_are_asked_for() -> None:
    executor = all_containers(build(FOLDER / "overlays" / "cpu"))["executor"]
    found = settings(executor)
    assert isinstance(found, RunExecutorSettings)
    assert executor["resources"]["requests"]["cpu"] == str(found.threads)
    assert "cpu" not in executor["resources"]["limits"]


def test_both_containers_have_the_same_gpu() -> None:
    objects = build(FOLDER / "overlays" / "gpu")
    spec, found = pod(objects, "StatefulSet", "executor"), all_containers(objects)
    (claim,) = spec["resourceClaims"]
    assert find(objects, "ResourceClaimTemplate", claim["resourceClaimTemplateName"])
    for name in ("kvmanager", "executor"):
        assert found[name]["resources"]["claims"] == [{"name": claim["name"]}]
    manager, executor = settings(found["kvmanager"]), settings(found["executor"])
    assert isinstance(manager, RunKvManagerSettings) and isinstance(executor, RunExecutorSettings)
    assert manager.pool == executor.pool == "vmm"
    assert executor.device == "cuda"


def test_pods_are_given_the_time_that_their_drain_takes(objects: list[dict[str, Any]]) -> None:
    frontend = settings(all_containers(objects)["frontend"])
    assert isinstance(frontend, RunFrontendSettings)
    spec = pod(objects, "Deployment", "frontend")
    assert spec["terminationGracePeriodSeconds"] > frontend.drain_seconds + SUPERVISOR_SECONDS
    assert frontend.drain_delay > 0
    assert pod(objects, "StatefulSet", "executor")["terminationGracePeriodSeconds"] > SUPERVISOR_SECONDS


def test_probes_ask_what_is_answered(objects: list[dict[str, Any]]) -> None:
    found = all_containers(objects)
    services = inference_pb2.DESCRIPTOR.services_by_name.values()
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        grpc = found["frontend"][probe]["grpc"]
        assert grpc["port"] == port_named(found["frontend"], "grpc")
        # Whether there is an executor is no reason to kill a frontend.
        assert ("service" in grpc) == (probe == "readinessProbe")
    assert found["frontend"]["readinessProbe"]["grpc"]["service"] in [service.full_name for service in services]
    for name in ("kvmanager", "executor"):
        listens = settings(found[name]).metrics_listen
        assert listens is not None
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = found[name][probe]["httpGet"]
            assert port_named(found[name], asked["port"]) == int(listens.rpartition(":")[2])
            assert asked["path"] == ("/live" if probe == "livenessProbe" else "/ready")


def test_a_pods_ports_differ_and_are_named_once(objects: list[dict[str, Any]]) -> None:
    for one in objects:
        ports = [port for container in containers(one) for port in container["ports"]]
        for key in ("name", "containerPort"):
            assert len({port[key] for port in ports}) == len(ports)


def test_nothing_is_allowed_that_is_not_needed(objects: list[dict[str, Any]]) -> None:
    for one in objects:
        if not containers(one):
            continue
        spec = one["spec"]["template"]["spec"]
        assert spec["automountServiceAccountToken"] is False
        # A Service called pagehold would set PAGEHOLD_PORT and the like.
        assert spec["enableServiceLinks"] is False
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (10001, 10001, 10001)
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


def test_only_frontends_reach_the_executor(objects: list[dict[str, Any]]) -> None:
    policy = find(objects, "NetworkPolicy", "executor")["spec"]
    to_grpc = [rule for rule in policy["ingress"] if {"port": "grpc"} in rule["ports"]]
    frontends = find(objects, "Deployment", "frontend")["spec"]["selector"]
    assert [rule["from"] for rule in to_grpc] == [[{"podSelector": frontends}]]
    assert all(rule.get("ports") for rule in policy["ingress"])
