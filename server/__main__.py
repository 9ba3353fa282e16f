"""`ladimo-server`: read the settings, then launch."""

import sys
from collections.abc import Sequence

from server import logs
from server.settings import read_settings

BAD_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 drained and done, 1 failed, 2 bad usage."""
    try:
        settings = read_settings(sys.argv[1:] if arguments is None else arguments)
    except ValueError as error:
        print(f"ladimo-server: {error}", file=sys.stderr)
        return BAD_USAGE
    logs.configure(settings.log_level)
    # Late, because torch and transformers take seconds to import, and --help and wrong flags need neither.
    from server.launch import launch

    return launch(settings)


if __name__ == "__main__":
    sys.exit(main())
