"""The app that commands are added to, and the arguments that several of them take."""

from pathlib import Path
from typing import Annotated, Any

import typer

from espalier.errors import UserError

# Modules are imported where they are used: `espalier --help` and `espalier plan` start without torch.
app = typer.Typer(
    name="espalier",
    help="Make large language models sparse, and measure what each step cost and saved.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
PIPELINE, LOOK, STAGE = "The pipeline", "Results and machine", "One stage (what the pipeline's rules call)"

Results = Annotated[Path, typer.Option("--results", help="The folder of results.")]
NodeId = Annotated[str, typer.Argument(metavar="NODE", help="Id of a node, or its first digits.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Hydra overrides, such as model=mixtral_8x7b.")
]


def parse_settings(words: list[str]) -> dict[str, Any]:
    """Parse KEY=VALUE words; values are YAML scalars or lists."""
    import yaml

    settings: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word}: not a setting. Write KEY=VALUE, such as ratio=0.5.")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{word}: the value is not YAML. Put it in quotes.") from None
    return settings
