"""Commands around the chain: installation, the lock, `make repro`, benchmarks, checks of the documentation."""

import tasks as tasks  # exits with a remedy if this Python lacks the packages
