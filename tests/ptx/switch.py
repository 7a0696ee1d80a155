"""``PTX=sm_90 pytest``: the suite's kernels run compiled for that GPU and interpreted.

To the library and to the tests it is a run with interpreted kernels; so this is imported before
the library, and after it Triton compiles all the same.
"""

from __future__ import annotations

import os

PTX = os.environ.get("PTX")
if PTX:
    import triton

    triton.knobs.runtime.interpret = False  # whatever the environment says from here on
    os.environ["TRITON_INTERPRET"] = "1"
