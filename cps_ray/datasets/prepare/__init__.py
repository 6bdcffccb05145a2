"""Raw data sets become checked shards: layouts, recipes, masks, checks, writing. Imports no torch."""
