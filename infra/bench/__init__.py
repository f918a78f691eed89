"""`make bench`: how fast, how good, how soon, measured beside the reference loop of diffusers.

Nothing of the chain imports this, and no test times anything: what is written here ends in `reports/bench.json`.
"""
