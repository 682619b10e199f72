"""`python -m redrafter`, as torchrun and accelerate start it."""

from redrafter.cli import main

if __name__ == "__main__":
    main()
