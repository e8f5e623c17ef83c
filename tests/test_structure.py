"""The rooms of the package have an order: what lies in one imports only from those before it, nothing in circles."""

import ast

import pytest

from conftest import ROOT

# From the first, which imports nothing of the package, to the last.
PACKAGE = (
    "terminal errors core timeline collector states gguf models synthetic text backends engine "
    "corpus serve cli lm_eval ray"
).split()
CUDA = (
    "constants units device programs attention_kernels delta_kernels mamba_kernels "
    "weights gemm kv_cache kernel_set ops state_access rehearsal bounds batch_size backend pipeline"
).split()


def imports_of(path):
    """The modules of kqprefill that a file imports anywhere, for types too: (line, dotted name)."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            yield node.lineno, [*base, *(node.module.split(".") if node.module else [node.names[0].name])]


def modules():
    return sorted((ROOT / "kqprefill").rglob("*.py"))


@pytest.mark.parametrize("room,order", [(["kqprefill"], PACKAGE), (["kqprefill", "backends", "cuda"], CUDA)])
def test_imports_go_one_way(room, order):
    depth, wrong = len(room), []
    for path in modules():
        own = list(path.relative_to(ROOT).with_suffix("").parts)
        if own[:depth] != room or own[depth] not in order:
            continue
        for line, module in imports_of(path):
            in_a_room = module[:depth] == room and len(module) > depth and module[depth] in order
            if in_a_room and order.index(module[depth]) > order.index(own[depth]):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {'.'.join(module)}")
    assert not wrong, "\n".join(wrong)


def test_every_module_has_its_place():
    for room, order, apart in (
        (ROOT / "kqprefill", PACKAGE, {"__init__", "__main__"}),
        (ROOT / "kqprefill/backends/cuda", CUDA, {"__init__"}),
    ):
        names = {p.stem for p in room.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
        assert names - apart == set(order)


def test_no_imports_in_a_circle():
    """Between single modules, whatever room they are in."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules()}
    known = {name.removesuffix(".__init__"): name for name in names.values()}
    edges = {}
    for path, name in names.items():
        targets = {known[".".join(m)] for _, m in imports_of(path) if ".".join(m) in known}
        edges[name] = {target for target in targets if target != name and not target.endswith("__init__")}
    done, under_way = set(), []

    def visit(name):
        assert name not in under_way, " -> ".join([*under_way[under_way.index(name) :], name])
        if name not in done:
            under_way.append(name)
            for target in sorted(edges[name]):
                visit(target)
            under_way.pop()
            done.add(name)

    for name in edges:
        visit(name)


def test_files_fit_in_one_read():
    folders = ROOT / "kqprefill", ROOT / "kernels", ROOT / "tests"
    files = [p for folder in folders for end in ("py", "cu", "cuh") for p in folder.rglob(f"*.{end}")]
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long


def test_lines_of_kernels_fit_120_columns():
    """Comments too, which clang-format leaves as they are."""
    kernels = sorted((ROOT / "kernels").rglob("*.cu*"))
    lines = ((path, number, line) for path in kernels for number, line in enumerate(path.read_text().splitlines(), 1))
    wrong = [f"{path.relative_to(ROOT)}:{number}" for path, number, line in lines if len(line) > 120]
    assert kernels and not wrong, "\n".join(wrong)
