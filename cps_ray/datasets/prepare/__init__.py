"""Raw data sets -> checked shards: layouts, recipes, masks, checks, writing. Imports no torch."""
