"""The kernels' block formats, compiled for the host: bit for bit what the host's own decoding gives. Needs a C++
compiler."""

import shutil
import subprocess

from gguf.constants import GGML_QUANT_SIZES
import numpy as np
import pytest

from conftest import ROOT
from kqprefill.backends.cuda.constants import SHARED_DEFINES, TILE_ROWS
from kqprefill.backends.cuda.device.codebooks import definitions
from kqprefill.backends.cuda.units import unit_size
from kqprefill.gguf import dequantize
from test_dequantize import FORMATS, rows_of


@pytest.fixture(scope="module")
def decode(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("traits")
    shutil.copytree(ROOT / "kernels" / "quants", folder / "quants")
    (folder / "include").mkdir()
    for name in ("types.cuh", "words.hpp"):
        shutil.copy(ROOT / "tests" / "host" / name, folder / "include")
    names = [kind.name for kind in FORMATS]
    tables = definitions(names) + f"#define TRY_ALL {' '.join(f'TRY({name})' for name in names)}\n"
    (folder / "decode.cpp").write_text(tables + (ROOT / "tests" / "host" / "decode.cpp").read_text())
    subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-O1",
            "-ffp-contract=off",
            *(f"-D{name}={value}" for name, value in SHARED_DEFINES.items()),
            "-I",
            folder,
            folder / "decode.cpp",
            "-o",
            folder / "decode",
        ],
        check=True,
    )
    return folder / "decode"


@pytest.mark.parametrize("kind", FORMATS, ids=lambda t: t.name)
def test_a_tile_decodes_to_the_hosts_bits(decode, kind):
    columns = unit_size(kind)[0]
    raw = rows_of(kind, TILE_ROWS, columns, np.random.default_rng())
    done = subprocess.run([decode, kind.name], input=raw.tobytes(), capture_output=True, check=True)
    got = np.frombuffer(done.stdout, np.float32).reshape(TILE_ROWS, columns)
    assert raw.nbytes == TILE_ROWS * columns // GGML_QUANT_SIZES[kind][0] * GGML_QUANT_SIZES[kind][1]
    assert np.array_equal(got.view(np.uint32), dequantize(raw, kind).view(np.uint32))
