"""``python -m scaling_ray.cli``."""

from __future__ import annotations

import sys

from scaling_ray.cli import main

sys.exit(main())
