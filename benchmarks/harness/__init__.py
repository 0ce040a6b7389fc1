"""The harness of every experiment: tasks, arms, training, result rows, tables and plots."""
