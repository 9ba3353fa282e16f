"""`ladimo-server`: read the settings, take the address and the files that are this server's alone, then launch."""

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
    """Exit codes: 0 drained and done, 1 failed, 2 bad usage."""
    # Imports are late: a signal is heeded from the first moment, and --help and wrong flags do not wait for torch.
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
    """The process: `main`, and an end that cannot fail.

    A signal that comes before the server handles signals itself ends the process at once with 0. Nothing has begun by then.

    The interpreter's own end is skipped. It would stop the engine's thread wherever it is. In the middle of a native library's
    C++ code that aborts the process: while a model loads, or when a step hangs.
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
        with suppress(OSError, ValueError):  # whoever read it is gone
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    command()
