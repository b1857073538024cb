"""Calibration of the noise range, layer sweeps and ablations."""
