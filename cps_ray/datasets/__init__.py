"""Bytes to samples: raw formats, splits, Parquet shards, augmentation. Has only the batch contract in common with the engine."""
