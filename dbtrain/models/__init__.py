"""Architectures behind the plug of `dbtrain.method.interface`, one a file."""
