"""Many blocks on many GPUs: plan and lifecycle are pure; only ``ray.py`` knows Ray."""
