"""One model split into shards and stages: loading, parallel layers, attention, workers."""
