"""The command line: `python -m tunescope`. Each command imports its own half of the project only when called."""

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tunescope import __version__
from tunescope.cli_tables import Folder, Format, table_app
from tunescope.config import LATENCY, NCU, POINTS_HELP, THROUGHPUT
from tunescope.errors import UserError
from tunescope.families import FAMILIES, find_family
from tunescope.ncu.settings import DEFAULT_MAX_LAUNCHES
from tunescope.ncu.settings import PHASES as NCU_PHASES
from tunescope.ncu.settings import Settings as NcuSettings

if TYPE_CHECKING:
    from tunescope.gpus import Gpu
    from tunescope.measure.plan import PointSpec

INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells have it
PROJECT_ROOT = Path(__file__).resolve().parents[2]
# Above every error of usage. Newer typers hold a click of their own, whose classes are not those of the package.
_ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=__doc__,
)
run_app = typer.Typer(no_args_is_help=True, help="Measure the points of a figure; finished ones are skipped.")
app.add_typer(run_app, name="run")
app.add_typer(table_app, name="table")


Model = Annotated[str, typer.Option(help=", ".join(FAMILIES))]
Preset = Annotated[str, typer.Option(help="auto, full, slice or tiny")]
GpuIndex = Annotated[int | None, typer.Option(help="which of the visible GPUs; the first if not given")]
Out = Annotated[Path | None, typer.Option(help="folder of results; below profile_data/ if not given")]
Points = Annotated[list[str] | None, typer.Option(help=POINTS_HELP)]
Queries = Annotated[int | None, typer.Option(help="one epoch over so many queries; 1000 is the paper's protocol")]
Datasets = Annotated[list[str] | None, typer.Option(help="a data file, FILE or NAME=FILE; repeatable")]
ModelPath = Annotated[Path | None, typer.Option(help="folder with a checkpoint, or with just its config.json")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="list the points and stop")]
Fresh = Annotated[bool, typer.Option("--fresh", help="measure again what is done; old results move to superseded/")]
Scan = Annotated[str, typer.Option(help="BlackMamba's selective scan: auto, triton, mamba-ssm or reference")]
Moe = Annotated[str, typer.Option(help="how experts run: auto, stock or grouped; BlackMamba's grouped or loop")]
Recompute = Annotated[
    str | None,
    typer.Option(
        help="gradient checkpointing: auto, in as many layers as memory needs (grouped); none; else the recipe's"
    ),
]
Graphs = Annotated[bool, typer.Option(help="grouped experts: replay steps as CUDA graphs")]
Reentrant = Annotated[bool, typer.Option("--reentrant", help="reentrant gradient checkpointing (the study: not)")]
MaxSeconds = Annotated[
    float | None, typer.Option(help="after 20 steps, time a point no longer than this; else 600, breakdowns 60")
]
MemoryBudgetGib = Annotated[float | None, typer.Option(help="use no more GPU memory than this")]


@run_app.command("throughput")
def run_throughput(
    model: Model = "mixtral",
    preset: Preset = "auto",
    gpu: GpuIndex = None,
    out: Out = None,
    points: Points = None,
    queries: Queries = None,
    dataset: Datasets = None,
    model_path: ModelPath = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    reentrant: Reentrant = False,
    scan: Scan = "auto",
    moe: Moe = "auto",
    recompute: Recompute = None,
    graphs: Graphs = True,
    max_seconds: MaxSeconds = None,
    memory_budget_gib: MemoryBudgetGib = None,
) -> None:
    """Figure 8: fine-tuning throughput, dense and sparse, by batch size."""
    _run(THROUGHPUT, "throughput.py", **locals())


@run_app.command("latency")
def run_latency(
    model: Model = "mixtral",
    preset: Preset = "auto",
    gpu: GpuIndex = None,
    out: Out = None,
    points: Points = None,
    seq_len: Annotated[
        int | None, typer.Option(help="length of every query (tokens); the paper's ablation: 64 to 1024")
    ] = None,
    queries: Queries = None,
    dataset: Datasets = None,
    model_path: ModelPath = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    reentrant: Reentrant = False,
    scan: Scan = "auto",
    moe: Moe = "auto",
    recompute: Recompute = None,
    max_seconds: MaxSeconds = None,
    memory_budget_gib: MemoryBudgetGib = None,
) -> None:
    """Figures 4, 5 and 11: where the time and memory of a step go, by phase, layer and operator; tokens per expert."""
    _run(LATENCY, _latency_parser(model), **locals())


@run_app.command("kernels")
def run_kernels(
    model: Model = "mixtral",
    preset: Preset = "auto",
    gpu: GpuIndex = None,
    out: Out = None,
    points: Points = None,
    ncu: Annotated[
        str | None, typer.Option(help="Nsight Compute's ncu, if neither on the PATH nor in CUDA_HOME")
    ] = None,
    launches: Annotated[
        int, typer.Option(help="launches of a point to count, chosen over all operators; 0 for every one")
    ] = DEFAULT_MAX_LAUNCHES,
    phases: Annotated[str, typer.Option(help="which of forward, recompute and backward")] = ",".join(NCU_PHASES),
    layers: Annotated[str | None, typer.Option(help="decoder layers to count in, as 0,15,31; all if not given")] = None,
    clock_control: Annotated[str, typer.Option(help="none, or base: the GPU held at its base clock")] = "none",
    cache_control: Annotated[str, typer.Option(help="all: caches emptied before each replay; or none")] = "all",
    dataset: Datasets = None,
    model_path: ModelPath = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    reentrant: Reentrant = False,
    scan: Scan = "auto",
    moe: Moe = "auto",
    memory_budget_gib: MemoryBudgetGib = None,
) -> None:
    """Figures 6, 9 and 10: what the kernels of the MoE layer make of the GPU, by Nsight Compute, or modelled."""
    settings = NcuSettings(
        path=ncu,
        clock_control=clock_control,
        cache_control=cache_control,
        max_launches=launches,
        phases=tuple(name.strip() for name in phases.split(",")),
        layers=_whole_numbers("--layers", layers),
    )
    scripts = find_family(model).scripts
    _run(
        NCU,
        f"sm_{scripts}.py" if scripts else "-m tunescope table sm",
        model=model,
        preset=preset,
        gpu=gpu,
        out=out,
        points=points,
        dataset=dataset,
        model_path=model_path,
        dry_run=dry_run,
        fresh=fresh,
        reentrant=reentrant,
        scan=scan,
        moe=moe,
        memory_budget_gib=memory_budget_gib,
        ncu=settings,
    )


def _whole_numbers(flag: str, text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UserError(f"{flag} {text!r} is not a list of whole numbers", cure=f"write it as {flag} 0,15,31") from None


def _latency_parser(model: str) -> str:
    scripts = find_family(model).scripts
    return f"{scripts}_latency.py" if scripts else "-m tunescope table latency"


def _run(
    kind: str,
    parser: str,
    *,
    out: Path | None,
    points: list[str] | None,
    dataset: list[str] | None,
    dry_run: bool,
    fresh: bool,
    **others: Any,
) -> None:
    """What every `run` command does with its flags. parser: the script that prints the table of what is measured."""
    from tunescope.measure.plan import Options, make_plan
    from tunescope.measure.sweep import is_done, run_sweep

    options = Options(
        kind=kind, points=None if points is None else " ".join(points), datasets=tuple(dataset or ()), **others
    )
    plan = make_plan(options, _layers_to_recompute)
    out_dir = out if out is not None else PROJECT_ROOT / "profile_data" / options.model / options.kind
    if dry_run:
        typer.echo(f"preset {plan.size.preset}: {plan.size.reason}; results in {out_dir}")
        for spec in plan.specs:
            state = "done, skipped" if is_done(spec, out_dir) and not fresh else "to run"
            typer.echo(
                f"{spec.point_id}  ({spec.workload.point.label}; weights {spec.weights['kind']}, "
                f"data {spec.data['kind']})  {state}"
            )
        return
    typer.echo(f"preset {plan.size.preset}: {plan.size.reason}", err=True)
    counts = run_sweep(plan, out_dir, fresh=fresh, guess=_guess_max_batch)
    typer.echo(f"Table: python3 {parser} {_short(out_dir)}")
    if counts.get("failed"):
        raise typer.Exit(1)


def _layers_to_recompute(
    config: dict[str, Any], recipe: dict[str, Any], batch_size: int, longest_tokens: int, gpu_memory_bytes: int
) -> tuple[int, ...]:
    from tunescope.accelerate import step_memory
    from tunescope.models.fast_moe_recompute import choose_checkpointed_layers

    memory = step_memory(config, recipe, batch_size, longest_tokens, gpu_memory_bytes)
    return choose_checkpointed_layers(config["num_hidden_layers"], memory)


def _guess_max_batch(spec: "PointSpec", gpu: "Gpu | None") -> int | None:
    """Where the search for a point's largest batch begins: where memory is predicted to end."""
    from tunescope.cost.estimate_memory import guess_max_batch

    if gpu is None or spec.search is None:
        return None
    budget_bytes = min(gpu.memory_total_bytes, spec.memory_budget_bytes or gpu.memory_total_bytes)
    workload = spec.workload
    return guess_max_batch(
        workload.model_config, workload.recipe, budget_bytes, spec.search.longest_tokens, moe_path=workload.moe
    )


@app.command("estimate")
def estimate(
    model: Annotated[
        str, typer.Option(help="a family (mixtral, blackmamba, qwen3_moe), a folder with a config.json, or that file")
    ] = "mixtral",
    data: Annotated[
        str, typer.Option(help="cs, math, a histogram (.csv: length_tokens,count) or a data file (.json, .jsonl)")
    ] = "cs",
    epochs: Annotated[
        float | None, typer.Option(help="passes over the data; the --recipe's if not given, else 1")
    ] = None,
    queries: Annotated[
        int | None, typer.Option(help="trained in an epoch; as the --recipe limits them if not given, else all")
    ] = None,
    gpu: Annotated[list[str] | None, typer.Option(help="a40,h100,...; repeatable; all if not given")] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            help="queries a micro-batch; fastest: of those that fit, the one that takes least time; max: the largest "
            "that fits; the --recipe's if not given, else fastest"
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="ours, or paper: its Equations 1 and 2 and Table IV")] = "ours",
    sparsity: Annotated[str | None, typer.Option(help="sparse or dense")] = None,
    top_k: Annotated[int | None, typer.Option(help="experts a token, instead of --sparsity")] = None,
    cutoff_len: Annotated[
        int | None,
        typer.Option("--cutoff-len", "--seq-len", help="queries are cut at this (tokens); else the recipe's"),
    ] = None,
    price: Annotated[list[str] | None, typer.Option(help="GPU=USD_PER_HOUR, as a40=0.37; repeatable")] = None,
    prices: Annotated[
        Path | None, typer.Option(help="a CSV of prices: gpu,usd_per_hour[,date,provider,source]")
    ] = None,
    calibrate: Annotated[Path | None, typer.Option(help="folder of points measured on your GPU")] = None,
    recipe: Annotated[Path | None, typer.Option(help="a LLaMA-Factory YAML file; else the family's own")] = None,
    moe: Annotated[str | None, typer.Option(help="path of the experts: stock, grouped or loop")] = None,
    graphs: Annotated[
        bool | None, typer.Option(help="grouped experts: steps are replayed as CUDA graphs; so if not given")
    ] = None,
    recompute: Annotated[
        str | None,
        typer.Option(help="layers run again in backward: all, none, or auto, as few as memory allows (grouped)"),
    ] = None,
    format: Format = "text",
) -> None:
    """Hours, USD and energy of a fine-tuning run, from config, data and GPU; nothing is run."""
    from tunescope.report.estimate import print_estimate

    settings = None
    if recipe is not None:
        from tunescope.train.recipe import load_recipe

        settings = load_recipe(recipe)
    if not print_estimate(
        model,
        data,
        method=method,
        format=format,
        epochs=epochs,
        queries=queries,
        gpus=gpu or ["all"],
        batch=batch,
        sparsity=sparsity,
        top_k=top_k,
        cutoff_len=cutoff_len,
        prices=[*(price or ()), *([str(prices)] if prices else ())],
        calibrate=calibrate,
        recipe=settings,
        moe=moe,
        graphs=graphs,
        recompute=recompute,
    ):
        raise typer.Exit(UserError.EXIT_CODE)


@app.command("report")
def report(
    folder: Folder,
    other: Annotated[Path | None, typer.Argument(metavar="[DIR2]", help="points to compare with")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the page and its figures")] = Path("report"),
    png: Annotated[bool, typer.Option("--png", help="figures as PNG, too")] = False,
    pdf: Annotated[bool, typer.Option("--pdf", help="figures as PDF, too")] = False,
    price: Annotated[list[str] | None, typer.Option(help="GPU=USD_PER_HOUR, as a40=0.37; repeatable")] = None,
) -> None:
    """Figures and one HTML page of whatever points DIR holds; of two folders, compared."""
    from tunescope.cost.prices import read_user_prices
    from tunescope.report.page.build import write_report

    typer.echo(write_report(folder, other, out, png=png, pdf=pdf, prices=read_user_prices(price or ())))


@app.command("train", context_settings={"allow_interspersed_args": True})
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="a LLaMA-Factory YAML file")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="settings that replace the recipe's"),
    ] = None,
) -> None:
    """Run one recipe as it stands, with this project's models registered. Measures nothing."""
    from tunescope.train.recipe import load_recipe, with_overrides

    settings = with_overrides(load_recipe(recipe), overrides or [])
    from tunescope.train.run_recipe import run_recipe

    run_recipe(settings, recipe)


@app.command("download")
def download_models(
    model: Annotated[
        list[str] | None, typer.Option(help="mixtral or blackmamba; repeatable; both if not given")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be fetched and stop")] = False,
) -> None:
    """Fetch the checkpoints from the Hub into HF_HOME; resumes where it was interrupted."""
    from tunescope.checkpoints import REPOS
    from tunescope.download import download

    download(model or list(REPOS), dry_run=dry_run, hf_home=None, echo=typer.echo)


@app.command("doctor")
def doctor() -> None:
    """Say what this machine has, what is missing, and which preset `auto` takes."""
    from tunescope.doctor import examine

    for line in examine():
        typer.echo(line)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Where the time, memory, energy and money of fine-tuning an LLM go."""


def _short(path: Path) -> str:
    """A path as the user would type it from where they are."""
    linked = Path("profile_data")  # LLaMA-Factory/ reaches the results through a link
    for start, typed in ((Path.cwd(), Path()), (linked, linked)):
        if path.resolve().is_relative_to(start.resolve()):
            return f"./{typed / path.resolve().relative_to(start.resolve())}"
    return str(path)


def main() -> NoReturn:
    """Runs the command line; a UserError becomes a paragraph on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        exit_code = app(prog_name="tunescope", standalone_mode=False) or 0
    except UserError as error:
        print(f"tunescope: {error}", file=sys.stderr)
        exit_code = UserError.EXIT_CODE
    except _ClickException as error:
        error.show()
        exit_code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        exit_code = INTERRUPTED_EXIT_CODE
    except BrokenPipeError:  # `| head` closed our output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        exit_code = 0
    if exit_code == INTERRUPTED_EXIT_CODE:  # some typers turn KeyboardInterrupt into this exit code by themselves
        print(
            "tunescope: stopped; finished points are kept, run the same command again to go on",
            file=sys.stderr,
        )
    sys.exit(exit_code)


def _terminate(*_: object) -> NoReturn:
    """SIGTERM leaves through the same door as Ctrl-C, so that a scheduler's stop tidies up too."""
    raise KeyboardInterrupt
