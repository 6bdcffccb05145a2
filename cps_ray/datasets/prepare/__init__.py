"""From raw data sets to checked shards: layouts, recipes, masks, checks, writing. Imports no torch."""
