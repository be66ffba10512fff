"""The one entry: `python sweep.py` runs one cell, `python sweep.py -m ...` a sweep, `-m +study=NAME` a study.

    python sweep.py stage1_tokens=50k                      one cell
    python sweep.py -m stage1_tokens=0,50k,100k seed=0,1    a sweep: every combination
    python sweep.py -m +study=mixer scale=smollm2           a table of the paper: sweeps/study/mixer.yaml
    python sweep.py -m +study=mixer plan=true               what that would compute and cost; nothing runs
    python sweep.py -m +study=mixer hydra/launcher=slurm    as SLURM jobs: slurm/README.md
    python sweep.py --help                                 every setting

Hydra reads the command line and sweeps/; hm runs the cells; analysis prints the table at the end.
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hm.config import GROUPS, Settings, check_choice, check_names, from_dict, help_text
from hm.errors import UserError
from hm.store import Store

ROOT = Path(__file__).parent
CONFIGS = ROOT / "sweeps"
SWEEP_KEYS = ("row", "rows", "runs", "plan", "resources")
CHOICES = ("scale", "study", "recipe")


@dataclass
class SweepSettings(Settings):
    """What may be typed here beside a cell's settings."""

    runs: str | None = None  # the store; null: HM_RUNS, or ./runs
    plan: bool = False  # say what would be computed, and compute nothing
    rows: dict[str, Any] = field(default_factory=dict)  # a study's rows: name -> the settings that make it
    resources: dict[str, Any] = field(default_factory=lambda: {"gpus": 1, "nodes": 1, "time": "24h"})  # of a training job


# as plain values: Hydra would answer a wrong type with a text of its own, before from_dict sees it
ConfigStore.instance().store(name="settings", node=asdict(SweepSettings()))
OmegaConf.register_new_resolver("row_names", lambda rows: ",".join(f"'{name}'" for name in rows), replace=True)


def store_folder(runs: str | None) -> str:
    """Where runs and artifacts are kept: runs=, else HM_RUNS, else ./runs."""
    return str(Path(runs or os.environ.get("HM_RUNS") or "runs").expanduser())


OmegaConf.register_new_resolver("store", store_folder, replace=True)


def plain_of(cfg: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """A composed configuration as plain data, without Hydra's own part."""
    own = OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k != "hydra"])
    return OmegaConf.to_container(own, resolve=resolve)  # type: ignore[return-value]


def settings_of(plain: dict[str, Any], typed: list[str], folders: Sequence[Path] = (CONFIGS,)) -> Settings:
    """The settings of one cell: defaults, scale and study, then what was typed, then its row's own. A typed recipe= is for the
    rows that name none; one that a row names is a file of `folders`.

    Raises:
        UserError: a row that the study doesn't have, or a typed setting that the study's rows differ in.
    """
    rows = plain.get("rows") or {}
    plain = {k: v for k, v in plain.items() if k not in ("rows", "runs", "plan", "resources")}
    for key in CHOICES:
        if isinstance(plain.get(key), dict):
            raise UserError(f"the file of {key}= lacks its first line, `# @package _global_`, without which its settings are not settings of a cell.")
    row = plain.get("row")
    if row is not None and rows:
        if row not in rows:
            near = difflib.get_close_matches(str(row), rows, n=1)
            raise UserError(f"row={row} is not in this study;{f' did you mean {near[0]}?' if near else ''} Known: {', '.join(rows)}.")
        names = {o.split("=")[0].lstrip("+~") for o in typed} - {"recipe"}
        for name, value in rows[row].items():
            deciding = [r for r, own_settings in rows.items() if name in own_settings]
            if name in names and len(deciding) > 1:
                raise UserError(f"{name}= is what the row {row!r} of this study decides ({name}={value}); leave it out, or choose row=.")
        own = dict(rows[row])
        if "recipe" in own:  # a row may name a file of sweeps/recipe/, as the command line may
            own = {k: v for k, v in recipe_settings(own.pop("recipe"), folders).items() if k not in names} | own
        plain = flattened(plain) | own
    return from_dict(plain)


def flattened(plain: dict[str, Any]) -> dict[str, Any]:
    """Groups of settings by their full names: {"stage2": {"lr": ...}} as {"stage2.lr": ...}."""
    groups = {g: values for g, values in plain.items() if g in GROUPS and isinstance(values, dict)}
    flat = {f"{g}.{k}": v for g, values in groups.items() for k, v in values.items()}
    return {k: v for k, v in plain.items() if k not in groups} | flat


def recipe_settings(name: str, folders: Sequence[Path]) -> dict[str, Any]:
    """What the file of a recipe sets, the last of `folders` first.

    Raises:
        UserError: a recipe without a file.
    """
    files = {p.stem: p for folder in folders for p in (folder / "recipe").glob("*.yaml")}
    check_choice("recipe", name, sorted(files))
    return flattened(OmegaConf.to_container(OmegaConf.load(files[name])))  # type: ignore[arg-type]


def config_folders(config: Any) -> list[Path]:
    """Where scales, studies and recipes lie, by Hydra's part of a configuration: sweeps/ and the folder of --config-dir."""
    return [Path(source.path) for source in reversed(config.runtime.config_sources) if source.schema == "file"]


def check_typed(arguments: list[str]) -> None:
    """Answer a wrong name on the command line with the nearest right one, and see that the results can be kept.

    Hydra would answer with a traceback.

    Raises:
        UserError: a name, a study, a scale, a recipe or a folder that is not there or can't be written.
    """
    args = get_args(arguments)
    folders = [CONFIGS]
    if args.config_dir:
        folders.append(Path(args.config_dir))
        if not folders[-1].is_dir():
            raise UserError(f"--config-dir={args.config_dir} is no folder; name the one that holds study/NAME.yaml.")
    for argument in args.overrides:
        if "=" not in argument and not argument.startswith("~"):
            raise UserError(f"{argument} is no setting; write NAME=VALUE (python sweep.py --help lists them all).")
    typed = [a for a in args.overrides if "=" in a]
    if args.multirun and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("-m starts processes of its own; leave out the launcher before it, or run one cell without -m.")
    study = next((a for a in typed if a.startswith("+study=")), None)
    if study and not (args.multirun or args.cfg or args.info or any(a.startswith("row=") for a in typed)):
        raise UserError(f"{study} is a sweep over its rows; add -m, or choose one of them with row=.")
    keys = [a.split("=")[0].lstrip("+~") for a in typed]
    check_names([k for k in keys if not k.startswith(("hydra.", "hydra/")) and k not in (*CHOICES, *SWEEP_KEYS)])
    for argument, key in zip(typed, keys, strict=True):
        if key in CHOICES:
            check_choices(argument, key, sorted({p.stem for f in folders for p in (f / key).glob("*.yaml")}))
    if not (args.cfg or args.info):
        runs = [OverridesParser.create().parse_override(a).value() for a, k in zip(typed, keys, strict=True) if k == "runs"]
        Store(store_folder(str(runs[-1]) if runs and runs[-1] else None))


def check_choices(argument: str, key: str, known: list[str]) -> None:
    """Refuse a scale, recipe or study that has no file, and a study that Hydra would not run as a sweep over its rows."""
    typed = argument.split("=", 1)[1]
    for value in typed.split(","):
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            plus = "+" if key == "study" else ""
            hint = f"; did you mean {plus}{key}={near[0]}?" if near else ";"
            own = "" if near else f" One of your own is a file {key}/{value}.yaml in the folder that --config-dir names."
            raise UserError(f"{key}={value} is not known{hint} Known: {', '.join(known)}.{own}")
    if key == "study" and "," in typed:
        raise UserError(f"{argument} names several studies; run them one after the other.")
    if key == "study" and not argument.startswith("+"):
        raise UserError(f"{argument} needs a plus before it: write -m +{argument}.")


@hydra.main(version_base="1.3", config_path="sweeps", config_name="config")
def main(cfg: DictConfig) -> None:
    from hm.progress import quiet, say

    quiet()
    from hm import parallel
    from hm.cache import use_cache
    from hm.cell import Cell
    from hm.check import pick_device
    from hm.errors import Interrupted
    from slurm.job import StopRequest
    from slurm.job import leave as leave_job

    typed, store = list(HydraConfig.get().overrides.task), Store(store_folder(cfg.runs))
    use_cache(store.root)
    alone = os.environ.get("WORLD_SIZE", "1") == "1"  # a launcher of several processes passes Ctrl-C on in its own way
    with StopRequest(30.0, leave_job, keyboard=alone) as stop:
        try:
            settings = settings_of(plain_of(cfg), typed, config_folders(HydraConfig.get()))
            if cfg.plan:
                return print_plan(settings, store)
            with parallel.group(pick_device(settings.device)):
                record = Cell(settings, store, stop=stop).run()
        except UserError as error:
            leave(error)
        except Interrupted as saved:
            say(f"{saved}; the same command goes on from there")
            leave_job(stop.status)
    if parallel.rank() == 0:
        print(summary(record))


def print_plan(settings: Settings, store: Store) -> None:
    """What one cell would compute and cost."""
    from hm.cell import Cell
    from slurm.offline import OfflineInputs
    from slurm.plan import describe, make_plan

    cell = Cell(settings, store, inputs=OfflineInputs())
    print(describe(make_plan([(f"{cell.s.study}/{cell.name}", cell, {})])))


def summary(record: dict) -> str:
    """A finished cell in one line."""
    ppl = record["metrics"]["ppl"]
    return f"{record['study']}/{record['cell']}: validation perplexity {ppl['value']:.2f} ± {ppl.get('stderr', 0):.2f}"


def leave(error: UserError) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def show_help() -> None:
    print(__doc__)
    studies = ", ".join(sorted(p.stem for p in (CONFIGS / "study").glob("*.yaml")))
    scales, recipes = (", ".join(sorted(p.stem for p in (CONFIGS / kind).glob("*.yaml"))) for kind in ("scale", "recipe"))
    print(f"Studies (+study=): {studies}\nScales (scale=): {scales}\nRecipes (recipe=): {recipes}\nresults are kept under runs= or HM_RUNS (default: runs)\n\nSettings:")
    print(help_text())
    print(f"\nThe default scale sets:\n{(CONFIGS / 'scale' / 'tiny.yaml').read_text().partition('scale: tiny')[2]}")
    print("\n  --hydra-help lists Hydra's own flags; --cfg job prints the composed settings.")


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise what goes wrong rather than print it and leave with status 1
    if any(a in ("--help", "-h") for a in sys.argv[1:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # of --help | head
        show_help()
        sys.exit()
    try:
        check_typed(sys.argv[1:])
        main()
    except UserError as error:
        leave(error)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what was saved", file=sys.stderr)
        sys.exit(130)
    except (HydraException, OmegaConfBaseException) as error:
        found = " ".join(f"{error} {error.__cause__ or ''}".split())
        leave(UserError(f"the command line can't be read ({found}); python sweep.py --help shows how to write it."))
