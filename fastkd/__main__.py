"""`python -m fastkd`, which launchers such as torchrun need."""

from fastkd.cli import main

if __name__ == "__main__":
    main()
