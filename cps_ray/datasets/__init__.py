"""Bytes to samples: raw formats, splits, Parquet shards, augmentation. Shares only the batch contract with the engine."""
