"""The experiments of the papers, one script per paper."""
