"""Client library for the HTTP and gRPC doors."""
