"""What tuning, saving and serving cost: operations, time, memory, bytes."""
