#!/usr/bin/env python3
"""Write REPRODUCTION.md from the list of items in `pdae_nb.experiments.items`.

python .ci/write_reproduction.py           # write it
python .ci/write_reproduction.py --check   # exit 1 if it is out of date
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pdae_nb.experiments.items import markdown  # noqa: E402

PATH = ROOT / 'REPRODUCTION.md'


def main(check: bool) -> int:
    old = PATH.read_text(encoding='utf-8') if PATH.exists() else ''
    if old == markdown():
        return 0
    if check:
        print('REPRODUCTION.md is out of date: run python .ci/write_reproduction.py')
        return 1
    PATH.write_text(markdown(), encoding='utf-8')
    print('wrote REPRODUCTION.md')
    return 0


if __name__ == '__main__':
    sys.exit(main('--check' in sys.argv[1:]))
