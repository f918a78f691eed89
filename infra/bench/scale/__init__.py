"""`python -m infra.bench scale`: the stages of the data on a simulated data set of a million rows."""
