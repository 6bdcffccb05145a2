"""What the commands share: errors become one line and an exit code."""

import sys
from collections.abc import Callable, Sequence

from cps_ray.errors import CpsRayError


def guarded(run: Callable[[], int]) -> int:
    """The exit code of `run`; a CpsRayError is printed as one line on stderr."""
    try:
        return run()
    except CpsRayError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    except KeyboardInterrupt:
        return 130


def entry(main: Callable[[Sequence[str] | None], int]) -> None:
    """`python -m cps_ray.<command>`."""
    sys.exit(main(None))
