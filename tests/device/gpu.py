"""All that Pagehold uses of a GPU, by its stand-ins: `--device cuda --cuda-driver tests.device.gpu`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.device.fake_memory import exporter, importer

if TYPE_CHECKING:
    from services.executor.runner.cuda.platform import Platform

__all__ = ["exporter", "importer", "make_platform"]


def make_platform() -> Platform:
    """Imported only here: the manager needs no torch."""
    from tests.device.host_driver import make_platform as make

    return make()
