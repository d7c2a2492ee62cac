"""Where the process begins and ends; `python -m mossnano_stdio` and `mossnano-stdio` both come here.

Rules of this room:

- Signals are caught before anything heavy is imported: imports take longer than a user takes to press Ctrl-C.
- Native libraries get no chance to spoil the exit status on their way out.
- numpy starts a thread for each core as soon as it is imported, for matrix products that we leave to onnxruntime. Here
  it does not, unless the user asks for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

from mossnano_stdio.process.stdio import Stopped, StopSignals


def run() -> NoReturn:
    """The console script."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    signals = StopSignals()
    signals.install()
    try:
        with signals.ending():
            from mossnano_stdio.process.loop import main
        status = main(signals)
    except Stopped as stopped:
        status = stopped.exit_status
    except SystemExit as exiting:  # --help, or a wrong command line
        status = exiting.code if isinstance(exiting.code, int) else 0
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        sys.stderr.flush()
    if sys.platform == "win32":
        from mossnano_stdio.process.logs import flush_stderr

        flush_stderr()
    os._exit(status)


if __name__ == "__main__":
    run()
