"""What stands around the chain: installation, the lock, `make repro`, configuration of machines."""

import tasks as tasks  # says what to do where this Python lacks the packages
