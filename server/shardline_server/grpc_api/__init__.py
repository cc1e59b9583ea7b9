"""The gRPC door: `shardline.v1.Generation`, health and reflection."""
