"""Hosts that can be imported, and nothing of them left behind."""

from __future__ import annotations

import os
import tempfile

from shims import make_hosts_importable

from tritonloss._dispatch import INTERPRET

# before ultralytics is imported: it writes its settings there
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp()
os.environ["YOLO_OFFLINE"] = "true"

collect_ignore_glob = ["test_*.py"] if INTERPRET else []  # says the same in the plain run
if not INTERPRET:
    make_hosts_importable()
