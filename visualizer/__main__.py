"""``python -m visualizer`` is ``minipaged visualize``."""

import sys

from minipaged.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "visualize")
    main()
