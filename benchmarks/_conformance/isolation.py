"""Ask a question in a process of its own: a crash or a hang is an answer too."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class DiedError(Exception):
    """The process ended without an answer."""

    verdict = "died"


class HungError(Exception):
    """The process was still at work when its time was over."""

    verdict = "hung"


def isolated(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fork of this process, silenced; returns what it returned.

    Raises:
        DiedError: if the process ended without an answer, an exception included.
        HungError: if it was not done after ``seconds``; it is killed then.
    """
    context = multiprocessing.get_context("fork")  # torch is imported, nothing has been computed
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise HungError(f"not done after {seconds:.0f} s")
        return receiver.recv()
    except EOFError:
        process.join()
        raise DiedError(f"the process ended with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        receiver.close()


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    sender.send(function(*arguments))
