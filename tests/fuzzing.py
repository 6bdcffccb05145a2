"""Files damaged at random, to see that a reader refuses them in one line, or reads them, and does nothing else."""

from collections.abc import Callable

import numpy as np

from cps_ray.datasets.prepare.findings import BadItemError

TEXT = b'0123456789-.eE{}[],:"tfn'
"""What is likely to give another file that can still be read, in JSON and in columns of numbers."""


def damaged(data: bytes, draw: np.random.Generator, alphabet: bytes) -> bytes:
    """Returns bytes with some changed, to any byte or to one of `alphabet`, left out or doubled."""
    changed = bytearray(data)
    for _ in range(draw.integers(1, 6)):
        at = int(draw.integers(0, len(changed)))
        match draw.integers(0, 4):
            case 0:
                changed[at] = draw.integers(0, 256)
            case 1:
                changed[at] = draw.choice(list(alphabet))
            case 2:
                del changed[at : at + int(draw.integers(1, 20))]
            case _:
                changed[at:at] = changed[at : at + int(draw.integers(1, 20))]
        if not changed:
            break
    return bytes(changed)


def fuzz(data: bytes, use: Callable[[bytes], object], times: int = 2000, alphabet: bytes = TEXT) -> None:
    """Damages a file again and again: what cannot be used is refused in one line, and nothing else happens."""
    draw, messages = np.random.default_rng(0), []
    for _ in range(times):
        try:
            use(damaged(data, draw, alphabet))
        except BadItemError as error:
            messages.append(str(error))
    assert 0 < len(messages) < times
    assert all(message.encode() and "\n" not in message for message in messages)
