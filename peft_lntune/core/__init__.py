"""What an affine norm is and what a delta does to it: torch only, no PEFT, no transformers."""
