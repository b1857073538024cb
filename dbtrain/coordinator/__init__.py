"""Many blocks on many GPUs: plan and lifecycle are pure; only ``ray.py`` and ``ray_train.py`` know Ray."""
