"""Stage fetch@<dataset>: from its source to data/<dataset>/."""

from pathlib import Path

from filelock import FileLock

from pipeline import run_stage
from sdpipe.config import get_value, parse_section, read_params
from sdpipe.data.config import DATASET_SECTIONS
from sdpipe.data.fetch import fetch
from sdpipe.errors import ConfigError
from sdpipe.files import work_folder


def main(dataset: str) -> None:
    if dataset not in DATASET_SECTIONS:
        raise ConfigError(f"no data set {dataset!r}; there are {', '.join(DATASET_SECTIONS)}")
    values = get_value(read_params(Path("params.yaml")), f"fetch.{dataset}")
    config = parse_section(DATASET_SECTIONS[dataset], values, f"fetch.{dataset}")
    with FileLock(work_folder() / f"fetch-{dataset}.lock"):  # two fetches of one data set take turns
        meta = fetch(dataset, config, Path("data") / dataset, work_folder() / "downloads" / dataset)
    shared = meta["test_images_also_in_train"]
    print(
        f"{dataset}: {meta['num_train']:,} training and {meta['num_test']:,} test images "
        f"of {len(meta['class_names'])} classes, {meta['image_size'][0]} x {meta['image_size'][1]}; "
        + (
            "training pictures stay in their files"
            if shared is None
            else f"{shared:,} test images are identical to a training image"
        )
    )
    counts = zip(meta["class_names"], meta["test_images_per_class"], strict=True)
    if untested := [name for name, count in counts if not count]:
        print(f"{dataset}: no test image of class {', '.join(untested)}")
    if ignored := meta["source"].get("num_ignored_files"):
        print(
            f"{dataset}: {ignored:,} files were left out: no pictures, by their names, or in no class folder"
        )


if __name__ == "__main__":
    run_stage(main)
