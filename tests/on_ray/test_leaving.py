import subprocess
import sys

import pytest

SILENT = """
import socket, threading, time
from cps_ray.on_ray import leaving

leaving.HEAD_PATIENCE_S, leaving._LOOK_S = 0.5, 0.05
head = socket.create_server(("127.0.0.1", 0))
port = head.getsockname()[1]
if {answers_at_first}:
    threading.Timer(0.5, head.close).start()
else:
    head.close()
ended = threading.Event()
threading.Thread(
    target=leaving._watch_head, args=(f"127.0.0.1:{{port}}", ended, lambda text: print(text, flush=True)), daemon=True
).start()
time.sleep(5)
"""


@pytest.mark.parametrize(("answers_at_first", "code"), [(True, 1), (False, 0)])
def test_a_silent_head(answers_at_first: bool, code: int) -> None:
    """A head that falls silent ends the process; one that never answered, as behind a proxy, does not."""
    script = SILENT.format(answers_at_first=answers_at_first)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert ("has not answered for 0.5 s" in done.stdout) == bool(code)
