"""What a norm is, and how it runs with other parameters than its own."""
