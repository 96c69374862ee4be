"""Known vulnerabilities of the pinned packages: pip-audit over constraints.txt, less what is listed with reasons.

python .ci/audit.py      with pip-audit installed (`make audit` does)

Exit code 0: none known. 1: some are, and each is named. 75: the service that knows them (pypi.org) does not answer, so
NOTHING WAS CHECKED; it says so, and whoever asks decides whether to go on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXCEPTIONS = ROOT / ".ci/audit-exceptions.txt"
SERVICE = "https://pypi.org/pypi/jinja2/2.4.1/json"
"""A release with known vulnerabilities: a mirror that has files alone answers too, and would find nothing anywhere."""
NOT_CHECKED = 75


def exceptions(text: str) -> dict[str, str]:
    """Reason by vulnerability, of lines ``ID reason``.

    Raises:
        ValueError: A line has no reason.
    """
    found = {}
    for line in text.splitlines():
        name, _, reason = line.partition("#")[0].strip().partition(" ")
        if name and not reason.strip():
            raise ValueError(f"{EXCEPTIONS.name}: {name}: expected a reason after it, got none")
        if name:
            found[name] = reason.strip()
    return found


def is_answering(url: str = SERVICE) -> bool:
    """Whether the service that pip-audit asks is there, and knows vulnerabilities."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(json.load(answer).get("vulnerabilities"))
    except (OSError, ValueError):
        return False


def main() -> int:
    """Check, and say what was left out."""
    known = exceptions(EXCEPTIONS.read_text(encoding="utf-8"))
    for name, reason in known.items():
        print(f"excepted: {name}: {reason}")
    if not is_answering():
        print(
            f"NOT CHECKED: {SERVICE} does not answer with what is known; run `make audit` where it can", file=sys.stderr
        )
        return NOT_CHECKED
    ignored = [word for name in known for word in ("--ignore-vuln", name)]
    command = [sys.executable, "-m", "pip_audit", "-r", str(ROOT / "constraints.txt"), "--no-deps", "--disable-pip"]
    return subprocess.run([*command, *ignored], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
