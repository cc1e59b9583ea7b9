"""Protobuf packages below `shardline`."""
