#!/bin/sh
# curl: sh curl.sh [URL]
set -eu
url=${1:-http://127.0.0.1:8000}

curl --silent --show-error --fail-with-body "$url/v1/completions" \
  --header 'Content-Type: application/json' \
  --data '{"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}'
echo

# --no-buffer shows each event as it comes; closing curl ends the request.
curl --silent --show-error --fail-with-body --no-buffer "$url/v1/chat/completions" \
  --header 'Content-Type: application/json' \
  --data '{"messages": [{"role": "user", "content": "Name three rivers."}],
           "max_tokens": 32, "temperature": 0, "stream": true}'
