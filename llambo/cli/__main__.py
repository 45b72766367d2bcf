"""`python -m llambo.cli` is `llambo`."""

from llambo.cli.main import main

if __name__ == "__main__":
    main(prog_name="llambo")
