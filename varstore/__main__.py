"""``python -m varstore`` is the command line."""

from varstore.cli import main

if __name__ == "__main__":
    main(prog_name="varstore")
