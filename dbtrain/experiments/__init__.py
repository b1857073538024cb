"""Comparisons of whole runs: baselines, ablations, the table of a plan, and faults on purpose."""
