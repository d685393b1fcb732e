"""The element types of tensors and pages: the settings' names, their types in `device.cuh`, their sizes."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

Dtype = Literal["bfloat16", "float16"]  # of activations and weights
KvDtype = Literal["bfloat16", "float16", "fp8_e4m3"]  # of pages


class Element(NamedTuple):
    """c_type: its name in `device.cuh`. itemsize: bytes."""

    c_type: str
    itemsize: int


ELEMENTS: Final[dict[str, Element]] = {
    "bfloat16": Element("bf16", 2),
    "float16": Element("f16", 2),
    "fp8_e4m3": Element("e4m3", 1),
}
