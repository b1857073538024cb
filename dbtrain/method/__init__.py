"""The method of the paper, in torch only: noise, ranges, split, objective and sampler."""
