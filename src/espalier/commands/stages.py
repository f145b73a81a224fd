"""Commands that run one stage of one node: what the rules of the pipeline call."""

from pathlib import Path

from espalier.commands.app import STAGE, NodeId, Results, app
from espalier.errors import UserError


def _stage(name: str, what: str) -> None:
    @app.command(name, help=what, rich_help_panel=STAGE)
    def stage(node: NodeId, results: Results = Path("results")) -> None:
        from espalier import stages
        from espalier.artefacts import lineage
        from espalier.artefacts.store import Store

        store = Store(results)
        document = lineage.find(store, node)
        if document["stage"] != name:
            raise UserError(f"{node} is a {document['stage']} node: run `espalier {document['stage']} {node}`.")
        print(stages.run(document["id"], store))


_stage("fetch", "Bring a model to this machine.")
_stage("tokens", "Make calibration tokens.")
_stage("collect", "Run the model once over the tokens and keep statistics.")
_stage("reduce", "Join the statistics of a calibration's shards.")
_stage("fit", "Learn what a method needs to be learnt, by running the model.")
_stage("plan", "Decide from statistics what to keep, merge or skip.")
_stage("apply", "Write the checkpoint that a plan says.")
_stage("teacher", "Keep the original model's likeliest tokens on a tuning text.")
_stage("tune", "Tune the routers of a checkpoint.")
_stage("score", "Score a checkpoint on its tasks.")
_stage("speed", "Time a checkpoint against the uncompressed model.")
_stage("table", "Put an experiment's scores into a table.")
_stage("report", "Write an experiment's HTML report.")
