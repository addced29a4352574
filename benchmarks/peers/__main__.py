"""fastkd against its peers: the same optimiser step through each that can make it.

`python -m benchmarks.peers [--quick] [--device cuda] [--only GROUP ...] [--output FILE]`, in the
environment of `make peers`. Before anything is timed all rows of a loss must have the same loss and
gradient on the same batch; then each row's memory is measured in a process of its own, and all rows
of a case are timed in turn.
"""

from benchmarks.peers.vision import declare_operators


def main() -> None:
    declare_operators()
    # what imports transformers, and with it torchvision
    from benchmarks.peers.command import run

    run()


if __name__ == "__main__":
    main()
