"""Further sizes of a run, beside those that the stage made: models/<run>/pruned-extra/.

keep-N.safetensors, keep-N.onnx     as in pruned/
keep-N.json                         what prune.json says of a size, and from what it was made
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sdpipe.config import describe
from sdpipe.data.store import DataSet
from sdpipe.deploy.config import ExportConfig, PruneConfig
from sdpipe.deploy.files_of_run import EXTRA, PRUNED, WEIGHTS
from sdpipe.deploy.pruning.prune import open_material, write_size
from sdpipe.errors import DataError, ModelError
from sdpipe.files import read_json, write_json
from sdpipe.training.run_files import read_cells
from sdpipe.training.weights import load_info, load_weights


@dataclass(frozen=True, kw_only=True, eq=False)
class Further:
    """Sizes of a run that the stage has not made and that can be made."""

    folder: Path  # models/<run>
    counts: list[int]
    order: list[int]  # all blocks, the least worthy first
    config: PruneConfig
    export: ExportConfig
    made_from: dict[str, Any]  # to stand beside them


def plan_further(folder: Path, counts: Sequence[int]) -> Further:
    """Sizes in the order and with the settings of pruned/; what stands there is not made again.

    Raises ModelError if the network has no such size, DataError if pruned/ cannot be read or belongs to
    another training.
    """
    info = load_info(folder / WEIGHTS)
    written = folder / PRUNED / "prune.json"
    facts = read_json(written, ("fingerprint", "why_empty", "prune", "export", "sizes"))
    if facts["fingerprint"] != info.fingerprint:
        raise DataError(f"{folder / PRUNED}: made from another training; run `dvc repro`")
    if facts["why_empty"]:
        raise ModelError(f"{folder}: {facts['why_empty']}")
    num_blocks = info.network.num_blocks
    for count in counts:
        if not 1 <= count < num_blocks:
            raise ModelError(
                f"{folder}: expected 1 to {num_blocks - 1} of its {num_blocks} blocks, got {count}"
            )
    try:
        config = PruneConfig.model_validate(facts["prune"])
        export = ExportConfig.model_validate(facts["export"])
    except ValidationError as error:
        raise DataError(f"{written}: {describe(error)}; run `dvc repro prune`") from error
    made = {size["name"] for size in facts["sizes"]}
    return Further(
        folder=folder,
        counts=[count for count in counts if f"keep-{count}" not in made],
        order=read_order(folder / PRUNED / "order.csv", num_blocks),
        config=config,
        export=export,
        made_from={"fingerprint": info.fingerprint, **settings_of(facts)},
    )


def prune_further(further: Further, dataset: DataSet) -> None:
    """Write models/<run>/pruned-extra/; not into pruned/, since that is DVC's."""
    folder, config = further.folder, further.config
    weights = load_weights(folder / WEIGHTS)
    material = open_material(weights.info, dataset, config)
    for count in further.counts:
        size = write_size(folder / EXTRA, weights, further.order, count, material, config, further.export)
        write_json(folder / EXTRA / f"keep-{count}.json", {**further.made_from, **size})


def settings_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a size depends on beside the training, as prune.json and the JSON beside a further size have it.

    Which other sizes the stage makes is left out.
    """
    prune = {name: value for name, value in facts.get("prune", {}).items() if name != "keep"}
    return {"prune": prune, "export": facts.get("export")}


def read_order(path: Path, num_blocks: int) -> list[int]:
    """All blocks, the least worthy first, from order.csv. Raises DataError if it is missing or damaged."""
    cells = [row.get("ell", "") for row in read_cells(path)]
    ells = {str(ell): ell for ell in range(1, num_blocks + 1)}
    if len(cells) != num_blocks or set(cells) != set(ells):
        raise DataError(
            f"{path}: ell: expected the blocks 1 to {num_blocks}, each once, got {','.join(cells)[:80]}; run "
            "`dvc repro prune`"
        )
    return [ells[cell] for cell in cells]
