"""What `python -m common.statistics.calibrate` makes up, and what it shows of it."""
