"""The experiments of the papers, a script a paper."""
