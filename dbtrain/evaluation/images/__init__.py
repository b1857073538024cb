"""Metrics and samples of image models."""
