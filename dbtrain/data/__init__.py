"""Data: a batch is a function of (seed, block, step), so there is no position to save or to lose."""
