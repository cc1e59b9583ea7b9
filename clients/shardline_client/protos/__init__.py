"""Generated from the server's .proto files by `make protos`; never edited."""
