"""What is on disk: stores, shards, checkpoints, manifest, locks, and reading a merged directory.

Merging is `run/merge.py`. This is the only room that knows safetensors.
"""
