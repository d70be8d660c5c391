"""`python -m windkern.recipes [NAME]`: the recipes and what they are for, or the path of one."""

import sys
from pathlib import Path

from windkern.recipes import FOLDER, find, names, purpose

if __name__ == "__main__":
    if len(sys.argv) > 1:
        try:
            found = find(sys.argv[1])
        except FileNotFoundError as error:
            sys.exit(f"windkern.recipes: error: {error}")
        if not isinstance(FOLDER, Path) and found != Path(sys.argv[1]):
            sys.exit(f"windkern.recipes: error: {sys.argv[1]} is in an archive and has no path; unpack {FOLDER}")
        print(found)
    else:
        for name in names():
            print(f"{name:<12} {purpose(name)}")
