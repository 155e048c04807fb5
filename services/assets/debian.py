"""Description → synopsis pairs from Debian's package lists, made on the user's machine.

Every description carries the free licence of its package, so the pairs are derived at run time and not
shipped. apt fetches its lists into a temporary folder; the system's own lists and sources are only read.
"""

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from services.assets.registry import AssetError, Say

_READER = "/usr/lib/apt/apt-helper"
_BOILERPLATE = re.compile(
    r"transitional|dummy|metapackage|debug symbols|development files|documentation"
    r"|^This package (contains|provides) (the )?(development|documentation|shared)",
    re.IGNORECASE,
)


def write_synopses(target: Path, say: Say) -> None:
    """Write one JSON line (prompt: first paragraph of the description, response: synopsis, package) a source
    package.

    Raises AssetError without apt or when its lists cannot be fetched.
    """
    if shutil.which("apt-get") is None or not Path(_READER).is_file():
        raise AssetError(
            "debian-synopses needs apt-get: run this on Debian or Ubuntu, or in a container of one"
        )
    # apt takes a relative path as relative to its own folder.
    with tempfile.TemporaryDirectory(dir=target.parent.resolve()) as work:
        lists = Path(work) / "lists"
        (lists / "partial").mkdir(parents=True)
        say(
            "fetching English package lists with apt-get (about 16 MB; the system's own lists stay "
            "as they are)"
        )
        command = [
            "apt-get",
            "update",
            "-q",
            "-o",
            "Acquire::Languages=en",
            "-o",
            f"Dir::State::lists={lists}",
        ]
        command += ["-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache="]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        packages, translations = _largest(lists, "*_Packages*"), _largest(lists, "*Translation-en*")
        if packages is None or translations is None:
            problem = (done.stderr.strip().splitlines() or ["no list arrived"])[-1]
            raise AssetError(
                f"apt-get could not fetch the package lists: {problem}; check apt's sources and network"
            )
        rows = synopsis_pairs(_text(packages), _text(translations))
    with target.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    say(f"{len(rows)} description/synopsis pairs")


def synopsis_pairs(packages: str, translations: str) -> list[dict[str, str]]:
    """Rows {prompt, response, package}, one for each source package, sorted by source package.

    `packages` and `translations` are the contents of apt's Packages and Translation-en lists. Kept are first
    paragraphs of 15–120 words with synopses of 3–14 words that the paragraph does not repeat; transitional,
    debug, development and documentation packages are left out.
    """
    source_of = {}
    for stanza in packages.split("\n\n"):
        fields = dict(
            line.split(": ", 1) for line in stanza.split("\n") if ": " in line and not line[0].isspace()
        )
        if "Package" in fields:
            source_of[fields["Package"]] = fields.get("Source", fields["Package"]).split()[0]
    rows: dict[str, dict[str, str]] = {}
    for package, synopsis, description in sorted(_descriptions(translations)):
        paragraph = " ".join(description.split("\n\n")[0].split())
        if not (15 <= len(paragraph.split()) <= 120 and 3 <= len(synopsis.split()) <= 14):
            continue
        if _BOILERPLATE.search(f"{synopsis} {paragraph}") or synopsis.lower() in paragraph.lower():
            continue
        row = {"prompt": paragraph, "response": synopsis, "package": package}
        rows.setdefault(source_of.get(package, package), row)
    return [rows[source] for source in sorted(rows)]


def _descriptions(translations: str) -> Iterator[tuple[str, str, str]]:
    """(package, synopsis, long description) of every stanza that has all three; the last stanza of a package
    counts.
    """
    found: dict[str, tuple[str, str]] = {}
    for stanza in translations.split("\n\n"):
        package = synopsis = ""
        body: list[str] = []
        inside = False
        for line in stanza.split("\n"):
            if line.startswith(" ") and inside:
                body.append("" if line.strip() == "." else line[1:])
            elif line.startswith("Package: "):
                package = line.removeprefix("Package: ").strip()
            elif line.startswith("Description-en:"):
                synopsis, inside = line.removeprefix("Description-en:").strip(), True
        description = "\n".join(body).strip()
        if package and synopsis and description:
            found[package] = (synopsis, description)
    for package, (synopsis, description) in found.items():
        yield package, synopsis, description


def _largest(folder: Path, pattern: str) -> Path | None:
    """The main archive's list; those of security and updates repeat parts of it."""
    return max(folder.glob(pattern), key=lambda file: file.stat().st_size, default=None)


def _text(file: Path) -> str:
    """Contents of a list in whatever compression apt keeps it."""
    done = subprocess.run([_READER, "cat-file", str(file)], capture_output=True, check=True)
    return done.stdout.decode("utf-8", "replace")
