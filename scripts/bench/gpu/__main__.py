"""`python -m gpu`: scripts/gpu-check."""

from __future__ import annotations

import sys

from gpu.cli import main

sys.exit(main())
