"""The bank: rows, sources, heads, files; and that it keeps its word while threads pull at it."""
