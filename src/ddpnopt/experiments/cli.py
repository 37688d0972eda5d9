"""The program ``ddpnopt``: runs a command, and turns what goes wrong into one line and an exit code."""

import os
import sys
from collections.abc import Sequence

_EXTRA = frozenset({"jinja2", "matplotlib", "numpy", "optuna", "PIL", "rich", "scipy", "sklearn", "sqlalchemy", "tyro"})
_MISUSE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the program's name; None (default) takes the process's own.

    Returns:
        Exit code: 0 when done, 2 for settings or files that will not do, 128 plus the signal's number when
        stopped (130 for Ctrl-C).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from ddpnopt.experiments import commands, team
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        return _say(f"{error.name} is not installed; the command line needs: pip install 'ddpnopt[experiments]'")
    try:
        return commands.run(words or ["--help"])
    except team.ElsewhereError:
        return _MISUSE
    except ValueError as error:
        return _say(" ".join(str(error).split()))
    except OSError as error:  # full disk, no permission: the system's words name the file
        return _say(str(error))
    except KeyboardInterrupt:
        return _say("stopped", code=130)


def _say(text: str, code: int = _MISUSE) -> int:
    rank = os.environ.get("RANK", "0")  # set by a launcher of several processes
    print(f"ddpnopt: {f'rank {rank}: ' * (rank != '0')}{text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
