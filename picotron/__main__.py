"""``python -m picotron``: the ``picotron`` command."""

from __future__ import annotations

import sys

from picotron.cli import main

if __name__ == "__main__":
    sys.exit(main())
