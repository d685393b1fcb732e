"""`python -m peers_lib`, as scripts/bench/peers calls it."""

import sys

from peers_lib.cli import main

sys.exit(main())
