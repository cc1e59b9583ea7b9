"""The gRPC interface: .proto files and the stubs generated from them."""
