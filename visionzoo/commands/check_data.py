"""Say what a folder of COCO or ADE20K lacks, and where the data comes from.

visionzoo check-data {coco,ade20k} [FOLDER]
"""

import argparse

from visionzoo.engine import UserError


def main() -> None:
    """Parse, check, print."""
    from visionzoo.data.layouts import LAYOUTS, check_folder

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=list(LAYOUTS))
    parser.add_argument("folder", nargs="?", help="where the data is; without it, only where to get it is printed")
    args = parser.parse_args()
    print(LAYOUTS[args.dataset][0])
    if args.folder:
        found, missing = check_folder(args.dataset, args.folder)
        for line in found:
            print(line)
        if missing:
            raise UserError("\n".join(["incomplete:", *missing]))
        print("complete")
