"""`make bench`: speed, quality, sampling and start-up, compared with the reference training loop of diffusers.

The chain does not use this package, and no test checks a time; the results are in `reports/bench.json`.
"""
