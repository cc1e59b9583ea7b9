#!/bin/sh
# grpcurl, which learns the service by reflection: sh grpcurl.sh [HOST:PORT]
set -eu
target=${1:-127.0.0.1:50051}

grpcurl -plaintext -d '{
  "text": "The capital of France is",
  "sampling": {"max_tokens": 8, "temperature": 0}
}' "$target" shardline.v1.Generation/Generate

grpcurl -plaintext -d '{
  "chat": {"messages": [{"role": "user", "content": "Name three rivers."}]},
  "sampling": {"max_tokens": 32, "temperature": 0}
}' "$target" shardline.v1.Generation/GenerateStream
