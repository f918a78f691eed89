"""What stands around the chain: installation, the lock, `make repro`, configuration of machines."""
