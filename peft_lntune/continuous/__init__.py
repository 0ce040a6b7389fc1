"""transformers' continuous batching with an adapter per request."""

__all__: list[str] = []
