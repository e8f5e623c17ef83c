"""kqprefill doctor: what there is to run on, what will run, and what to mend."""

from __future__ import annotations

import platform

import click

from ..terminal import print_text
from .common import print_object, size, wrapped


@click.command()
@click.option(
    "--device", default=0, metavar="N", envvar="KQPREFILL_DEVICE", show_envvar=True, help="CUDA device number."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def doctor(context: click.Context, device: int, as_json: bool) -> None:
    """Say what there is to run on, and what to mend.

    Whether the GPU can be used, with which kernels, and what to do where something is wrong.

    Exit status 1 where the GPU cannot be used (the CPU always can).

    \b
    kqprefill doctor
    """
    from ..backends.cuda.device.compiler import KernelCache, ignored_variables
    from ..backends.cuda.device.gpu import Gpu
    from ..backends.cuda.kernel_set import kernel_set_of
    from ..errors import BackendError

    found = {"kqprefill": _version("kqprefill"), "python": platform.python_version()}
    problems = []
    for package in ("numpy", "gguf", "cuda-python", "cuda-core", "nvidia-cuda-nvrtc", "tokenizers", "jinja2"):
        found[package] = _version(package)
    if found["tokenizers"] is None:
        problems.append(
            "tokenizers is not installed: --prompt needs it for byte-level vocabularies (pip install 'kqprefill[text]')"
        )
    try:
        gpu = Gpu(device)
    except BackendError as error:
        found["gpu"], usable = None, False
        problems.append(f"the CPU will run: {error}")
    else:
        usable, (free, total) = True, gpu.memory()
        found["gpu"] = f"{gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}"
        found["memory"] = f"{size(free)} free of {size(total)}"
        driver = gpu.driver.cuDriverGetVersion()[1]
        found["driver"] = f"for CUDA {driver // 1000}.{driver % 1000 // 10}"
        try:
            kernel_set = kernel_set_of(gpu.capability)
            target = kernel_set.target
            found["kernels"] = f"{kernel_set.name}, compiled to {target.code_type} for {target.arch}"
        except (BackendError, ImportError, RuntimeError) as error:
            usable = False
            problems.append(f"kernels cannot be compiled: {error}; pip install 'nvidia-cuda-nvrtc>=13,<14'")
        gpu.close()
    cache = KernelCache()
    count, nbytes = cache.held()
    found["kernel cache"] = f"{cache.folder}: {count} programs, {size(nbytes)}"
    problems += ignored_variables()
    if why := cache.why_off():
        problems.append(f"every start compiles its kernels: {why}")
    if as_json:
        print_object({"usable": usable, "found": found, "problems": problems})
    else:
        width = max(map(len, found))
        for name, value in found.items():
            print_text(f"{name:{width}}  {value or 'none'}")
        for problem in problems:
            print_text(wrapped(f"! {problem}"))
    context.exit(0 if usable else 1)


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version  # 20 ms that other commands need not spend

    try:
        return version(package)
    except PackageNotFoundError:
        return None
