"""What prepared shards hold, for people: statistics, contact sheets, a page."""
