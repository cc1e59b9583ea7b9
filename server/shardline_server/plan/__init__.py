"""`shardline plan`: what `serve` would do with a model, said before it does it."""
