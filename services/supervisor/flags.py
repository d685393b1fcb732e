"""Settings back to the flags that give them: how a supervisor hands its own to its children."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pagehold.runtime.settings import ComponentSettings

# `discard` is done once, by the supervisor: a component that is started again must not do it again.
# Which frontend a child is, the supervisor says itself.
_NOT_HANDED_ON: Final = ("parent_pid", "discard", "instance", "share_port")


def flags_of(settings: ComponentSettings, kind: type[ComponentSettings]) -> list[str]:
    """Flags for what was set, as far as `kind` has it; what was not set keeps its default there."""
    flags: list[str] = []
    for name in kind.model_fields:
        if name not in settings.model_fields_set or name in _NOT_HANDED_ON:
            continue
        value = getattr(settings, name)
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif value is not None:
            flags += [flag, str(value.resolve() if isinstance(value, Path) else value)]
    return flags
