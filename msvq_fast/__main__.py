"""``python -m msvq_fast`` is ``msvq``."""

from __future__ import annotations

import sys

from msvq_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
