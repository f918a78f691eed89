import importlib.util
import sys

if sys.version_info < (3, 11) or importlib.util.find_spec("pydantic") is None:
    sys.exit(
        f"error: this Python ({sys.executable}) does not have the packages of this project; run 'make install', then "
        "'source .venv/bin/activate'"
    )
