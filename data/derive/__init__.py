"""Sets derived once from others: groups, stale pairs, split captions."""
