"""Builds the site into build/site, strictly: what `make docs` runs.

    python docs/site/build.py

1. zensical builds what mkdocs.yml says, and stops at a broken link of a page.
2. A docstring that griffe cannot read as it was meant (an argument that the signature lacks) fails too.
3. Every public name has its place in the reference, as the built site's own inventory says.
4. No page of the site leads to nothing (`check_links.py`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from check_links import broken
from names import documented, public_names

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "build" / "site"


def main() -> int:
    if shutil.which("zensical", path=str(Path(sys.executable).parent)) is None:
        sys.stderr.write("zensical is not installed: pip install '.[docs]' (Python 3.11 and later)\n")
        return 2
    shutil.rmtree(SITE, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    sys.stdout.write(done.stdout)
    if done.returncode:
        return done.returncode
    unread = re.findall(r"^griffe: .*$", done.stdout, flags=re.MULTILINE)
    names = documented((SITE / "objects.inv").read_bytes())
    missing = [n for n in public_names(ROOT / "voco_plugin") if f"voco_plugin.{n}" not in names]
    faults = [
        *(f"docstring: {line}" for line in unread),
        *(f"no place in docs/reference/ for voco_plugin.{name}" for name in missing),
        *(f"broken link: {line}" for line in broken(SITE)),
    ]
    print("\n".join(faults) or f"{len(names)} names; no broken link: {SITE / 'index.html'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
