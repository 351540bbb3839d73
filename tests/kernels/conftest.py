"""The tests in ``interpreted`` need TRITON_INTERPRET=1 before triton is imported, so a process of their own.

`test_interpreted.py` starts it; any other process leaves them out.
"""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
