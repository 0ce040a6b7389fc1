"""What a config would do to a model, before anything is changed."""
