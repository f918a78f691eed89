"""What must be set before gradio is imported: no telemetry, and a folder for its files that ends with the process."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

from tasks.runtime import loopback

OFFLINE = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_NUM_WORKERS": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
}


def prepare() -> None:
    """Set the environment of gradio. Its copies of uploaded and drawn files are removed when the process ends."""
    loopback.exempt(os.environ)
    folder = tempfile.mkdtemp(prefix="afterimage-demo-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.update(OFFLINE, GRADIO_TEMP_DIR=folder)
