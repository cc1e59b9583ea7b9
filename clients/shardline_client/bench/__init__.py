"""The load generator behind `shardline bench`."""
