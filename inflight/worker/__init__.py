"""The worker process: `process` runs a servable's stages, `shard` one rank of a language model."""
