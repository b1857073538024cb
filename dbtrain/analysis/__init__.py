"""Calibration of the noise range, and codebooks from a corpus."""
