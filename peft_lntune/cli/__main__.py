"""`python -m peft_lntune.cli`, if the script is not on the path."""

from peft_lntune.cli import main

if __name__ == "__main__":
    main(prog_name="peft-lntune")
