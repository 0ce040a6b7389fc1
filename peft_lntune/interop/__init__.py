"""To and from what others read: PEFT's own formats and Trainer's checkpoints."""
