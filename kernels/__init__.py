"""The operations behind the cache: one folder each, a plain-torch reference in each folder."""
