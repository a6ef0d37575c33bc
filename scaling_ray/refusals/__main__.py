"""``python -m scaling_ray.refusals``."""

from __future__ import annotations

import sys

from scaling_ray.refusals.markdown import main

sys.exit(main())
