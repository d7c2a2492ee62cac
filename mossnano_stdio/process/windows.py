"""What Windows tells only through its own calls. Elsewhere this module is empty.

Rules of this room:

- Pipes cannot be polled on Windows. Whoever writes to one that is full waits in the system, where no signal reaches it:
  so writing.py's thread does the writing there.
"""

from __future__ import annotations

import sys

if sys.platform == "win32":
    import ctypes
    import msvcrt
    from ctypes import wintypes

    _KERNEL = ctypes.WinDLL("kernel32", use_last_error=True)
    _KERNEL.WriteFile.argtypes = [
        wintypes.HANDLE, wintypes.LPCVOID, wintypes.DWORD, ctypes.POINTER(wintypes.DWORD), wintypes.LPVOID,
    ]  # fmt: skip
    _KERNEL.GetFileType.argtypes = [wintypes.HANDLE]
    _KERNEL.GetCurrentProcess.restype = wintypes.HANDLE
    _KERNEL.K32GetProcessMemoryInfo.argtypes = [wintypes.HANDLE, wintypes.LPVOID, wintypes.DWORD]
    _PIPE = 3
    _BROKEN = (109, 232, 233)  # ERROR_BROKEN_PIPE, ERROR_NO_DATA, ERROR_PIPE_NOT_CONNECTED

    class _MemoryCounters(ctypes.Structure):
        _fields_ = [
            ("cb", wintypes.DWORD),
            ("page_faults", wintypes.DWORD),
            *(
                (name, ctypes.c_size_t)
                for name in ("peak_bytes", "bytes", "a", "b", "c", "d", "pagefile", "peak_pagefile")
            ),
        ]

    def is_pipe_without_reader(fd: int) -> bool:
        """Nothing at all is written, which fails where nobody could read it."""
        handle = msvcrt.get_osfhandle(fd)
        if _KERNEL.GetFileType(handle) != _PIPE:
            return False
        written = wintypes.DWORD()
        return not _KERNEL.WriteFile(handle, b"", 0, ctypes.byref(written), None) and ctypes.get_last_error() in _BROKEN

    def resident_bytes(*, peak: bool) -> int | None:
        """The memory that this process has resident, or the most that it has had."""
        counters = _MemoryCounters(cb=ctypes.sizeof(_MemoryCounters))
        if not _KERNEL.K32GetProcessMemoryInfo(_KERNEL.GetCurrentProcess(), ctypes.byref(counters), counters.cb):
            return None
        return int(counters.peak_bytes if peak else counters.bytes)
