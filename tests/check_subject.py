"""Refuse subjects of commits that are empty or have more than 72 characters: check_subject.py FILE or main..HEAD."""

import subprocess
import sys
from pathlib import Path

LIMIT = 72


def subjects(source: str) -> list[str]:
    """Return the subject of the message in a file, or those of a range of commits, without merges."""
    if Path(source).is_file():
        lines = Path(source).read_text(encoding="utf-8").splitlines()
        return [next((line for line in lines if not line.startswith("#")), "")]
    command = ["git", "log", "--no-merges", "--format=%s", source]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def main() -> None:
    """Print what is refused and exit with 1."""
    refused = [subject for subject in subjects(sys.argv[1]) if not 0 < len(subject) <= LIMIT]
    for subject in refused:
        print(f"subject of {len(subject)} characters, expected 1 to {LIMIT}: {subject}")
    sys.exit(bool(refused))


if __name__ == "__main__":
    main()
