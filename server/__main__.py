"""The command `ladimo-server`: read the settings, bind the address, lock the policies directory, then launch."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import NoReturn

BAD_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server. Returns the exit code: 0 drained and done, 1 failed, 2 bad usage."""
    # Imports are late, so that signals work from the first moment, and --help and wrong flags do not wait for torch.
    from server import logs
    from server.settings import read_settings

    try:
        settings = read_settings(sys.argv[1:] if arguments is None else arguments)
    except ValueError as error:
        print(f"ladimo-server: {error}", file=sys.stderr)
        return BAD_USAGE
    logs.configure(settings.log_level)
    from server.listening import listen
    from server.policies.directory import held

    with ExitStack() as stack:
        try:
            sockets = [stack.enter_context(each) for each in listen(settings.host, settings.port)]
            stack.enter_context(held(settings.policies_dir))
        except ValueError as error:
            print(f"ladimo-server: {error}", file=sys.stderr)
            return 1
        from server.launch import launch

        return launch(settings, sockets)


def command() -> NoReturn:
    """Run `main`, then end the process without the interpreter's own shutdown.

    A signal that arrives before the server handles signals ends the process at once with 0, because no work has begun. The
    interpreter's shutdown is skipped because it would stop the engine thread wherever it is. That aborts the process if the
    thread is inside the C++ code of a library, for example while a model loads or while a step hangs.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
    try:
        code = main()
    except SystemExit as end:  # --help and unknown flags
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads the stream any more
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    command()
