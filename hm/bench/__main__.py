"""`python -m hm.bench NAME ...`: run one of the benchmarks; `python -m hm.bench NAME --help` lists its options."""

import importlib
import sys

from hm.errors import UserError

BENCHMARKS = ("training", "inference")


def main(argv: list[str]) -> None:
    name = argv[0] if argv else ""
    if name not in BENCHMARKS:
        raise UserError(f"python -m hm.bench {name} names no benchmark; give one of {', '.join(BENCHMARKS)}.")
    importlib.import_module(f"hm.bench.{name}").main(argv[1:])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
