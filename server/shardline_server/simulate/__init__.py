"""`shardline simulate`: the scheduler and its admission on a virtual clock."""
