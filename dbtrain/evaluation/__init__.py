"""Merged model, sampler, metric."""
