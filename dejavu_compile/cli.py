"""The `dejavu` command."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

from .errors import DejavuError, OptionError

try:
    import typer
except ImportError:  # the extra is optional: the library itself needs neither typer nor rich
    typer = None


def _load(model: str, device: str) -> tuple:
    """A model in eval mode and its tokenizer, from a folder or a hub id."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown one, or a torch without it
        raise OptionError(
            f"device {device!r} can't be used", found=str(error).split("\n", 1)[0], expected="cpu, cuda, ..."
        ) from None  # fmt: skip
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"no model could be loaded from {model}", found=str(error).strip().split("\n", 1)[0],
            expected="a local folder with a model and its tokenizer, or a hub id",
        ) from None  # fmt: skip
    return loaded.to(device).eval(), tokenizer


def _app() -> "typer.Typer":
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
    Model = Annotated[str, typer.Argument(help="a local folder or a hub id")]
    Text = Annotated[Path, typer.Option(help="a UTF-8 text file", exists=True, dir_okay=False)]
    Device = Annotated[str, typer.Option(help="cpu, cuda, ...; default: a GPU if there is one")]
    Artifact = Annotated[
        Path, typer.Option(help="what `dejavu calibrate` saved", exists=True, file_okay=False)
    ]
    Json = Annotated[Path | None, typer.Option("--json", help="write all figures there")]

    @app.command()
    def demo() -> None:
        """Make a small real decoder sparse, and show its words, its quality and the speed."""
        from . import demo as module

        module.run()

    @app.command()
    def explain(
        model: Model, as_json: Annotated[bool, typer.Option("--json")] = False, device: Device = ""
    ) -> None:
        """Every projection of a decode step: what was done to it, and why not more."""
        import torch

        from .explain import explain as run

        loaded, _ = _load(model, device)
        ids = torch.zeros(1, 1, dtype=torch.long, device=next(loaded.parameters()).device)
        report = run(loaded, input_ids=ids)
        print(json.dumps(report.to_dict(), indent=1) if as_json else report)

    @app.command()
    def verify(
        model: Model, text: Text, windows: int = 8, length: int = 512, seed: int = 0, device: Device = "",
        json_path: Json = None,
        plot: Annotated[Path | None, typer.Option(help="draw a PNG there")] = None,
    ) -> None:  # fmt: skip
        """Does contextual sparsity exist in this model? Two passes, beside static and random choices."""
        from .text import windows as read
        from .verify import verify as run

        loaded, tokenizer = _load(model, device)
        result = run(loaded, read(tokenizer, text, length=length, limit=windows), seed=seed)
        _write(json_path, result.to_dict())
        if plot is not None:
            result.plot(plot)
        print(result)

    @app.command()
    def calibrate(
        model: Model, text: Text,
        out: Annotated[Path, typer.Option(help="the artifact's folder", file_okay=False)],
        policy: str = "auto", max_ppl_increase: float = 0.01, density: float | None = None,
        windows: int = 160, length: int = 512, seed: int = 0, device: Device = "", json_path: Json = None,
        workdir: Annotated[Path | None, typer.Option(
            help="a folder for what is recorded: needn't fit in memory, and the same command goes on from there",
            file_okay=False)] = None,
    ) -> None:  # fmt: skip
        """Fit predictors and thresholds on a text, and save them."""
        from .calibrate import calibrate as run
        from .text import windows as read

        loaded, tokenizer = _load(model, device)
        batches = read(tokenizer, text, length=length, limit=windows)
        result = run(
            loaded,
            batches,
            policy=policy,
            max_ppl_increase=max_ppl_increase,
            density=density,
            seed=seed,
            workdir=workdir,
        )
        result.save_pretrained(out)
        _write(json_path, result.to_dict())
        print(result)

    @app.command("eval")
    def evaluate(
        model: Model, text: Text, artifact: Artifact, windows: int = 64, length: int = 512,
        device: Device = "", json_path: Json = None,
    ) -> None:  # fmt: skip
        """Perplexity, KL and top-1 agreement with an artifact, against dense."""
        from .evaluate import evaluate as run
        from .read_artifact import load
        from .text import windows as read

        loaded, tokenizer = _load(model, device)
        load(loaded, artifact)
        result = run(loaded, read(tokenizer, text, length=length, limit=windows))
        _write(json_path, result.to_dict())
        print(result)

    @app.command()
    def bench(
        model: Model, artifact: Artifact | None = None, length: int = 512, batch: int = 1,
        repeats: int = 20, device: Device = "", json_path: Json = None,
    ) -> None:  # fmt: skip
        """Time one decode step with a full static cache: dense Inductor against dejavu, on this machine."""
        from .bench import compare_steps, environment
        from .read_artifact import load

        loaded, _ = _load(model, device)
        if artifact is not None:
            load(loaded, artifact)
        rows = compare_steps(loaded, length, batch, repeats)
        _write(json_path, {"environment": environment(), "model": model, "length": length,
                           "batch": batch, "rows": rows})  # fmt: skip
        _print_steps(rows)

    return app


def _write(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def _print_steps(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Decode step")
    for name in ("", "ms, median", "20 to 80 %", "", "error", "recompiles"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["provider"], f"{row['p50'] / 1e3:.3f}", f"{row['p20'] / 1e3:.3f} to {row['p80'] / 1e3:.3f}",
            f"{rows[0]['p50'] / row['p50']:.2f}x", f"{row['error']:.1e}", str(row["recompiles"]),
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    """Entry point: a mistake of the user's is one clear message on stderr and exit code 2."""
    if typer is None:
        sys.exit("the dejavu command needs typer and rich: pip install 'dejavu-compile[cli]'")
    try:
        _app()()
    except (DejavuError, OSError) as error:
        print(f"dejavu: {error}", file=sys.stderr)
        sys.exit(2)
