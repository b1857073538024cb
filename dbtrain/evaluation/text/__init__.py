"""Metrics and texts of language models."""
