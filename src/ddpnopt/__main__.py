"""``python -m ddpnopt``, and ``torchrun -m ddpnopt``: the command line, which needs the extra ``experiments``."""

import sys

if __name__ == "__main__":
    from ddpnopt.experiments.cli import main

    sys.exit(main())
