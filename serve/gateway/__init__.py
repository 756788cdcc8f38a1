"""What stands between a client and the engines: keys, limits, fallback, metrics, a record to learn from."""
