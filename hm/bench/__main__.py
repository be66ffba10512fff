"""`python -m hm.bench training|operator|inference`: speed and memory, as a table and as JSON under results/bench/."""

import importlib
import sys

from hm.cache import use_cache
from hm.config import check_choice
from hm.errors import UserError

KINDS = ("training", "operator", "inference")


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n\npython -m hm.bench KIND --help lists the options; KIND: {', '.join(KINDS)}")
        return
    check_choice("benchmark", argv[0], KINDS)
    use_cache("runs")
    importlib.import_module(f"hm.bench.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
