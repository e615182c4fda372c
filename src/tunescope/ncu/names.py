"""Names of kernels as torch's profiler prints them, from what the compiler named them.

ncu demangles in a manner of its own (`f<(int)4>(int, T2)` for `f<4, A>(int, A)`), so its names and a trace's do not
meet; the compiler's are one and the same. The profiler has them from the C++ runtime's `__cxa_demangle`, but for those
of more than 1,024 characters, which it leaves as they are (Kineto's Demangle.cpp).
"""

import contextlib
import ctypes
from functools import lru_cache
from typing import Any

MAX_DEMANGLED_CHARS = 1024
_LIBRARIES = ("libstdc++.so.6", "libc++abi.so.1", "libc++abi.dylib")


@lru_cache(maxsize=4096)
def demangled(mangled: str) -> str | None:
    """None for a name that is not a mangled one, is too long, or where there is no C++ runtime."""
    if not mangled.startswith("_Z") or len(mangled) > MAX_DEMANGLED_CHARS or (demangle := _demangler()) is None:
        return None
    status = ctypes.c_int()
    address = demangle(mangled.encode(), None, None, ctypes.byref(status))
    if not address:
        return None
    try:
        return ctypes.string_at(address).decode(errors="replace")
    finally:
        ctypes.CDLL(None).free(ctypes.c_void_p(address))


@lru_cache(maxsize=1)
def _demangler() -> Any:
    for name in _LIBRARIES:
        with contextlib.suppress(OSError, AttributeError):
            function = ctypes.CDLL(name)["__cxa_demangle"]
            function.restype = ctypes.c_void_p
            function.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
            return function
    return None
