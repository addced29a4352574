"""`python -m fastkd`, which launchers such as torchrun need."""

from fastkd.cli import main

main()
