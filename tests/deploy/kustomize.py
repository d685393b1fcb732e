"""As much of kustomize as our overlays use: resources, images, a namespace, strategic merges of lists by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

CLUSTER_WIDE = ("Namespace",)


def build(folder: Path) -> list[dict[str, Any]]:
    """All objects of a kustomization. Fails for a field of it that is not known here."""
    asked = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
    assert set(asked) <= known, f"{folder}: {set(asked) - known}"
    objects: list[dict[str, Any]] = []
    for name in asked["resources"]:
        path = folder / name
        objects += build(path) if path.is_dir() else _load(path)
    for patch in asked.get("patches", []):
        (change,) = _load(folder / patch["path"])
        (target,) = (one for one in objects if _identity(one) == _identity(change))
        target.update(merged(target, change))
    for one in objects:
        if asked.get("namespace") and one["kind"] not in CLUSTER_WIDE:
            one["metadata"]["namespace"] = asked["namespace"]
        for container in containers(one):
            for image in asked.get("images", []):
                if container["image"] == image["name"]:
                    container["image"] = f"{image.get('newName', image['name'])}:{image['newTag']}"
    return objects


def containers(one: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a Deployment or StatefulSet; of others none."""
    template = one.get("spec", {}).get("template", {})
    found: list[dict[str, Any]] = template.get("spec", {}).get("containers", [])
    return found


def merged(old: Any, new: Any) -> Any:
    """What a strategic merge makes of both."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {key: merged(old.get(key), new[key]) if key in new else old[key] for key in {**old, **new}}
    if isinstance(old, list) and isinstance(new, list) and all(isinstance(one, dict) and "name" in one for one in new):
        by_name = {one["name"]: one for one in old}
        changed = [merged(by_name.get(one["name"]), one) for one in new]
        return [*changed, *(one for one in old if one["name"] not in {one["name"] for one in new})]
    return new


def _load(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def _identity(one: dict[str, Any]) -> tuple[str, str]:
    return one["kind"], one["metadata"]["name"]
