"""The tests in ``interpreted`` need TRITON_INTERPRET=1 before triton is imported, so they run in their own process.

`test_interpreted.py` starts that process; any other process skips them.
"""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
