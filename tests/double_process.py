"""The real process around the decoder double: `python -m tests.double_process '{"step_seconds": 0.1}' --output raw`.

The first argument is JSON: what the double is to do wrong, and what is to be planted around it.

    step_seconds            each step takes so long
    load_seconds            so does loading, which says `loading` on stderr first
    not_finite_steps        these steps give a NaN
    failing_steps           these steps raise DecodeError
    ramp_second_frames      what measuring the ramp finds; it says `measuring` on stderr
    raising                 {"step": name of a builtin exception}: what the step raises
    noise                   each step prints, warns, and writes to fd 1 as a native library would
    nano                    frames as large as nano's, instead of 4 samples
    failing_reads           the how-manieth os.read raises EIO; likewise failing_writes
    short_writes            no write takes more than so many bytes
"""

from __future__ import annotations

import argparse
import builtins
import ctypes
import errno
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

from mossnano_stdio.process import loop, stdio
from mossnano_stdio.process.logs import flush_stderr
from tests.doubles import NANO, SMALL, CountingDecoder, CountingEncoder


def main() -> None:
    plan: dict[str, Any] = json.loads(sys.argv[1])

    def load(options: argparse.Namespace) -> loop.Loaded:
        if "load_seconds" in plan:
            print("loading", file=sys.stderr, flush=True)
            time.sleep(plan["load_seconds"])
        if options.encode:
            return loop.ready_to_encode(lambda: CountingEncoder(), {"demo": False})
        new_decoder = partial(
            CountingDecoder,
            NANO if plan.get("nano") else SMALL,
            step_seconds=plan.get("step_seconds", 0),
            not_finite_steps=plan.get("not_finite_steps", ()),
            failing_steps=plan.get("failing_steps", ()),
            on_step=lambda step: on_step(plan, step),
        )
        return replace(loop.ready_to_decode(new_decoder, {"demo": False}), ramp_second_frames=ramp_second_frames)

    @cache
    def ramp_second_frames() -> int:
        if "ramp_second_frames" in plan:
            print("measuring", file=sys.stderr, flush=True)
        second_frames: int = plan.get("ramp_second_frames", 2)
        return second_frames

    spoil_descriptors(plan)
    signals = stdio.StopSignals()
    signals.install()
    status = loop.main(signals, sys.argv[2:], load)
    flush_stderr()
    os._exit(status)


def on_step(plan: dict[str, Any], step: int) -> None:
    if plan.get("noise"):
        print("a stray print")
        sys.stdout.flush()
        os.write(1, b"a stray write\n")
        libc = ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None)
        libc.puts(b"a stray puts")
        libc.fflush(None)
        warnings.warn("a stray warning", stacklevel=1)
    name = plan.get("raising", {}).get(str(step))
    if name:
        raise getattr(builtins, name)(f"planted in step {step}")


def spoil_descriptors(plan: dict[str, Any]) -> None:
    """Make the functions that the process reads and writes with fail, or do less than they were asked to."""
    read = failing(os.read, plan.get("failing_reads", ()))
    write = failing(os.write, plan.get("failing_writes", ()))
    most = plan.get("short_writes")

    def short_write(fd: int, data: memoryview) -> int:
        written: int = write(fd, data[:most])
        return written

    stdio.InputThread.__init__.__defaults__ = (read,)
    stdio.OutputFd.__init__.__defaults__ = (short_write,)


def failing(call: Callable[..., Any], bad_calls: list[int]) -> Callable[..., Any]:
    calls = 0

    def spoiled(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls - 1 in bad_calls:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(*arguments)

    return spoiled


if __name__ == "__main__":
    main()
