"""The training loop and what it stands on: sharding, adapters, checkpoints, Ray Train workers."""
