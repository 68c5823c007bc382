"""Many processes: Ray, shards of a benchmark, ranks that make one video together."""
