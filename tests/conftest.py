"""Before anything imports torch: models as small as the tests' are slower on two threads than on one."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
