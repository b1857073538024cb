"""What is on disk: stores, shards, checkpoints, manifest,
locks and merge; the only room that knows safetensors."""
