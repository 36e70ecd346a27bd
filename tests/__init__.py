"""Imported before everything else that is tested, torch above all, which reads this once."""

import os

# For the processes that tests start, too. On small models threads gain nothing, and where other work has the cores
# as well they wait for each other: the suite takes six times as long.
os.environ["OMP_NUM_THREADS"] = "1"
