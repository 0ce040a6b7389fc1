"""What is in an adapter's files, and whether they are whole."""
