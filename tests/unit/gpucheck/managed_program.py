"""Run by test_parts.py: `python managed_program.py FOLDER`, where the driver lies."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np
import torch

from tests.gpu.managed import install

PAGE = 4096

folder = Path(sys.argv[1])
old_array, old_tensor = np.arange(7), torch.arange(5)
library = install(folder, str(folder / "driver.so"))
arrays = [np.zeros((10, 10)), np.random.default_rng(0).normal(size=100), np.concatenate([old_array, old_array])]
tensors = [torch.randn(100), torch.cat([old_tensor, old_tensor]), (torch.ones(3) * 2).bfloat16()]
assert all(array.ctypes.data % PAGE == 0 for array in arrays)
assert all(tensor.data_ptr() % PAGE == 0 for tensor in tensors)
grown = arrays[1].copy()
grown.resize(2000, refcheck=False)
assert grown[:100].tolist() == arrays[1].tolist() and not grown[100:].any()
assert arrays[2].sum() == 42 and tensors[1].sum() == 20
before = library.live()
del arrays, tensors, grown
gc.collect()
assert library.live() == before - 7, "what is dropped is given back"
