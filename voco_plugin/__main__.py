"""``python -m voco_plugin`` is ``voco``."""

import sys

from voco_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
