"""`python -m hvmodel` is the command `hvmodel`."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
