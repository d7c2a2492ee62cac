"""`python -m mossnano_stdio` is the process."""

from mossnano_stdio.process import run

if __name__ == "__main__":
    run()
