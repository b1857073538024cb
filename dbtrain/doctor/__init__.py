"""Whether a cluster, its nodes and the storage can run a training."""
