"""dbtrain: train a deep residual network as isolated blocks (DiffusionBlocks, arXiv 2506.14202)."""

__version__ = "0.2.0"
