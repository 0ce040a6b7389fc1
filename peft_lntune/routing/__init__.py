"""Which row of a batch uses which adapter, and the parameters of each row."""
