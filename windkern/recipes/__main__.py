"""`python -m windkern.recipes [NAME]`: the recipes and what they are for, or the path of one."""

import sys

from windkern.recipes import find, names, purpose

if __name__ == "__main__":
    if len(sys.argv) > 1:
        try:
            print(find(sys.argv[1]))
        except FileNotFoundError as error:
            sys.exit(f"windkern.recipes: error: {error}")
    else:
        for name in names():
            print(f"{name:<12} {purpose(name)}")
