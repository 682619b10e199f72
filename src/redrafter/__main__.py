"""`python -m redrafter`, which is what torchrun and accelerate start."""

from redrafter.cli import main

if __name__ == "__main__":
    main()
