"""Small C++ kernels for processors, built once at first use and kept in the user's cache; everything runs without them, slower.

A library for each source file beside this one: plain C functions over pointers, loaded by ctypes, no headers of torch, a few
seconds to compile. They share the OpenMP runtime that torch has loaded. ``OMNILORA_NATIVE=0`` turns them off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

KERNELS = "kernels"  # elementwise parts of fused passes
RAGGED = "ragged"  # low-rank updates of many adapters in one batch
HEADER = "bf16.h"  # what the sources include
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math",
         "-fopenmp", "-std=c++17", "-fPIC", "-shared")  # not -ffast-math: linked with it, a library sets flush-to-zero  # fmt: skip
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Unavailable(Exception):
    """Why there are no native kernels."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omnilora"


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@lru_cache(maxsize=1)
def computes_bf16() -> bool:
    """Whether this processor has instructions for bf16 products (AVX512-BF16, AMX, Arm's BF16)."""
    return bool(set(_processor().split()) & {"avx512_bf16", "amx_bf16", "bf16"})


@lru_cache(maxsize=1)
def multiplies_tiles() -> bool:
    """Whether this processor multiplies tiles of bf16 matrices (AMX)."""
    return "amx_bf16" in _processor().split()


def _compiler() -> str | None:
    """``CXX`` where it names a compiler of C++: some libraries set it to one of C, which links without C++'s runtime."""
    chosen = os.environ.get("CXX", "")
    return chosen if "++" in Path(chosen).name else shutil.which("g++") or shutil.which("clang++")


def _openmp(compiler: str) -> list[str]:
    """torch's own OpenMP runtime where it brings GNU's: two runtimes in a process would fight for its processors."""
    found = sorted(Path(torch.__file__).with_name("lib").glob("libgomp*.so*")) if "g++" in Path(compiler).name else []
    return [str(found[0]), "-Wl,--as-needed"] if found else []


def _build(source: str) -> Path:
    if os.environ.get("OMNILORA_NATIVE", "1") == "0":
        raise Unavailable("OMNILORA_NATIVE=0")
    if not sys.platform.startswith("linux"):
        raise Unavailable(f"not built on {sys.platform}")
    compiler = _compiler()
    if compiler is None:
        raise Unavailable("no C++ compiler")
    code = Path(__file__).with_name(f"{source}.cpp")
    texts = [code.read_bytes(), code.with_name(HEADER).read_bytes()]
    key = hashlib.sha256(repr((texts, FLAGS, _openmp(compiler), compiler, _processor(), torch.__version__)).encode()).hexdigest()
    path = cache_folder() / f"{source}-{key[:16]}.so"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / f"{source}.so"
            command = [compiler, *FLAGS, str(code), *_openmp(compiler), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode != 0:
                raise Unavailable(f"{compiler} failed: {done.stderr.strip()[-400:]}")
            os.replace(made, path)  # another process may have been faster: both files are the same
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{type(error).__name__}: {error}") from error
    return path


@lru_cache(maxsize=8)
def _load(source: str) -> tuple[ctypes.CDLL | None, str]:
    try:
        return ctypes.CDLL(str(_build(source))), ""
    except Unavailable as error:
        return None, str(error)
    except OSError as error:
        return None, f"the library does not load: {error}"


def library(source: str = KERNELS) -> ctypes.CDLL | None:
    """The kernels of one source, or None where they cannot be had; :func:`reason` says why."""
    return _load(source)[0]


def reason(source: str = KERNELS) -> str:
    return _load(source)[1]


def watched() -> bool:
    """Whether somebody follows each operation: a function transform, a tracer, a mode that counts, records or replays. Native code
    and writes in place are nothing to them."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or (torch._C._len_torch_function_stack() > 0 and not all(isinstance(m, DeviceContext) for m in _get_current_function_mode_stack()))
    )


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: on the CPU, contiguous, all fp32 or all bf16; no batches of gradients."""
    first = tensors[0].dtype
    if first not in DTYPES or library() is None:
        return False
    return all(t.dtype is first and t.is_contiguous() and t.device.type == "cpu" and not _batched(t) for t in tensors)


_batched = torch._C._functorch.is_legacy_batchedtensor  # what autograd.grad(is_grads_batched=True) hands to a backward pass


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Run ``name_f32`` or ``name_bf16``. Tensors go as pointers (None: null), integers as 64 bits, floats as 32."""
    function = _functions.get((name, dtype)) or _function(name, dtype, arguments)
    function(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])


_functions: dict[tuple[str, torch.dtype], Any] = {}


def _function(name: str, dtype: torch.dtype, arguments: tuple[Any, ...]) -> Any:
    found = getattr(library(), f"{name}_{DTYPES[dtype]}")
    found.restype = None
    found.argtypes = [ctypes.c_void_p if a is None or isinstance(a, Tensor) else ctypes.c_float if isinstance(a, float) else ctypes.c_int64
                      for a in arguments]  # fmt: skip
    _functions[name, dtype] = found
    return found
