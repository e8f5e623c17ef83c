"""Where a model is: a path, or a name in the local store of Hugging Face's library or of Ollama. Nothing is fetched.

Hugging Face's (huggingface_hub, "Understand caching"): `$HF_HUB_CACHE`, else `$HF_HOME/hub`, else
`$XDG_CACHE_HOME/huggingface/hub`, else `~/.cache/huggingface/hub`. A repository is the folder `models--OWNER--REPO`:
its `refs/main` holds the commit that the branch was at, and `snapshots/COMMIT/` the files of that commit by their
names, each a link to `blobs/`.

Ollama's (ollama, server/modelpath.go and manifest.go): `$OLLAMA_MODELS`, else `~/.ollama/models`, and where Ollama runs
as a service of the system `/usr/share/ollama/.ollama/models`. `manifests/HOST/NAMESPACE/NAME/TAG` is JSON (host
registry.ollama.ai, namespace library and tag latest where they are not said) whose `layers` have a `mediaType` and a
`digest`, `sha256:…`; that of the weights is `application/vnd.ollama.image.model`, the file `blobs/sha256-…`.
"""

from __future__ import annotations

from collections.abc import Iterator
import os
from pathlib import Path
import re

from ..errors import KqprefillError

_PART = re.compile(r"-(\d{5})-of-\d{5}$")  # of a split model's file, without its ending
_USUAL_QUANT = "Q4_K_M"  # llama.cpp's choice too, where a repository has several and none is named
_MODEL_LAYER = "application/vnd.ollama.image.model"
_OLLAMA_SPACE = ("registry.ollama.ai", "library")  # the host and the namespace of a plain name
_LARGEST_MANIFEST = 1 << 20  # bytes; they have some hundreds


def model_path(name: str) -> str:
    """The path of a model: as it is, below the user's folder (`~`), of `hf:OWNER/REPO[:QUANT]` or `ollama:NAME[:TAG]`.

    A file that is called just so comes first. Raises KqprefillError, which says where it looked.
    """
    if os.path.lexists(name):
        return name
    if name.startswith("hf:"):
        return str(_in_hugging_face(name.removeprefix("hf:")))
    if name.startswith("ollama:"):
        return str(_in_ollama(name.removeprefix("ollama:")))
    return from_home(name)


def from_home(path: str) -> str:
    """A path, whose `~` is the user's folder where no file is called so."""
    return os.path.expanduser(path) if path.startswith("~") and not os.path.lexists(path) else path


def _in_hugging_face(name: str) -> Path:
    match = re.fullmatch(r"([\w.-]+)/([\w.-]+?)(?::([\w.-]+))?", name, re.ASCII)
    if not match:
        raise KqprefillError(f"hf:{name}: the form is hf:OWNER/REPO or hf:OWNER/REPO:QUANT")
    owner, repo, quant = match.groups()
    folder = _hugging_face_folder() / f"models--{owner}--{repo}"
    snapshots = [folder / "snapshots" / commit for commit in _commits(folder)]
    snapshot = next((path for path in snapshots if path.is_dir()), None)
    if snapshot is None:
        raise KqprefillError(
            f"hf:{name}: there is no snapshot in {folder}; nothing is downloaded here: "
            f"`hf download {owner}/{repo} FILE.gguf` does, or set HF_HUB_CACHE or HF_HOME"
        )
    found = _models(snapshot)
    if not found:
        raise KqprefillError(f"hf:{name}: no .gguf in {snapshot}")
    wanted = [path for path in found if quant and _is_of(path, quant)]
    if quant:
        wanted = [path for path in wanted if quant in (path.name, path.stem)] or wanted
    else:
        wanted = found if len(found) == 1 else [path for path in found if _is_of(path, _USUAL_QUANT)]
    if len(wanted) != 1:
        names = ", ".join(str(path.relative_to(snapshot)) for path in (wanted or found))
        which = "several are meant" if wanted else "none is meant" if quant else "name one"
        raise KqprefillError(f"hf:{name}: {which}, as in hf:{owner}/{repo}:QUANT; {snapshot} has {names}")
    return wanted[0]


def _hugging_face_folder() -> Path:
    for variable, below in (("HF_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")):
        if value := os.environ.get(variable):
            return Path(os.path.expanduser(value)) / below
    return Path(os.path.expanduser("~/.cache/huggingface/hub"))


def _commits(folder: Path) -> Iterator[str]:
    """The commits whose snapshots may be meant: what main was at, else the latest that came."""
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch("[0-9A-Za-z]+", commit):
            yield commit
    except OSError:
        pass
    try:
        others = sorted((folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return
    yield from (path.name for path in others)


def _models(snapshot: Path) -> list[Path]:
    """The models of a snapshot, of a split one the first file; not what belongs to one (projectors, matrices of
    importance)."""
    found = []
    for path in sorted(snapshot.rglob("*.gguf")):
        part = _PART.search(path.stem)
        aside = re.search("mmproj|imatrix", path.name, re.IGNORECASE)
        if not aside and (part is None or part[1] == "00001"):
            found.append(path)
    return found


def _is_of(path: Path, quant: str) -> bool:
    """Whether a file's name ends in that quantisation as a word, so that Q4_K is not Q4_K_M; or is that name."""
    stem = _PART.sub("", path.stem)
    return quant == path.name or re.search(rf"(?:^|[-.]){re.escape(quant)}$", stem, re.IGNORECASE) is not None


def _in_ollama(name: str) -> Path:
    import json

    match = re.fullmatch(r"((?:[\w.-]+(?::\d+)?/)?(?:[\w.-]+/)?)([\w.-]+)(?::([\w.-]+))?", name, re.ASCII)
    if not match or ".." in name.split("/"):
        raise KqprefillError(f"ollama:{name}: the form is ollama:NAME or ollama:NAME:TAG")
    space, model, tag = match[1].split("/")[:-1], match[2], match[3] or "latest"
    host, namespace = [*_OLLAMA_SPACE[: 2 - len(space)], *space] if space else _OLLAMA_SPACE
    manifest = Path("manifests", host, namespace, model, tag)
    folders = _ollama_folders()
    folder = next((folder for folder in folders if (folder / manifest).is_file()), None)
    if folder is None:
        looked = " or ".join(str(folder / manifest) for folder in folders)
        raise KqprefillError(
            f"ollama:{name}: there is no {looked}; nothing is downloaded here: `ollama pull {name}` does, or set "
            "OLLAMA_MODELS"
        )
    path = folder / manifest
    try:
        with open(path, "rb") as file:
            layers = json.loads(file.read(_LARGEST_MANIFEST))["layers"]
        digest = next(layer["digest"] for layer in layers if layer["mediaType"] == _MODEL_LAYER)
    except OSError as error:
        raise KqprefillError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError, StopIteration):
        raise KqprefillError(f"{path}: no manifest of a model in GGUF (no layer {_MODEL_LAYER})") from None
    if not isinstance(digest, str) or not re.fullmatch("sha256:[0-9a-f]{64}", digest):
        raise KqprefillError(f"{path}: its model's digest is no sha256")
    blob = folder / "blobs" / digest.replace(":", "-")
    if not blob.is_file():
        raise KqprefillError(f"ollama:{name}: {path} names {blob}, which is not there; pull it again")
    return blob


def _ollama_folders() -> list[Path]:
    if value := os.environ.get("OLLAMA_MODELS"):
        return [Path(os.path.expanduser(value))]
    return [Path(os.path.expanduser("~/.ollama/models")), Path("/usr/share/ollama/.ollama/models")]
