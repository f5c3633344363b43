"""Does the spread of the sub-networks tell a network's errors from its hits?

    python -m benchmarks.uncertainty models/RUN [IMAGES]

prints, for the run's test part (or so many images of it, evenly taken), the area under the ROC curve of each
score for "the model is wrong", and error and negative log-likelihood of the average of M members.
N: images, K: classes, L: blocks, M: members.
"""

from pathlib import Path

import click
import numpy as np
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from sdpipe.data.store import DataSet, open_dataset
from sdpipe.errors import SdpipeError, errors_on_one_line
from sdpipe.runtime.artifact import open_artifact
from sdpipe.runtime.uncertainty import open_ensemble

MEMBERS = (4, 16)
BATCH = 250
RESAMPLES = 300  # of the bootstrap


def collect(folder: Path, images_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Logits of model.onnx (N, K), of the members of ensemble.onnx (M, N, K), and the temperature."""
    model = open_artifact(folder / "model.onnx", "cpu")
    ensemble = open_ensemble(model, max(MEMBERS), "cpu")
    own, members = [], []
    for at in range(0, len(images_NHWC), BATCH):
        batch_NHWC = np.array(images_NHWC[at : at + BATCH])
        own.append(model.run(batch_NHWC)[0])
        runs = [ensemble.artifact.run(batch_NHWC, switches_L)[0] for switches_L in ensemble.switches_ML]
        members.append(np.stack(runs))
    return np.concatenate(own), np.concatenate(members, axis=1), model.metadata.temperature


def scores(
    logits_NK: np.ndarray, logits_MNK: np.ndarray, temperature: float
) -> dict[tuple[str, int], np.ndarray]:
    """What could tell an error, larger where it is likelier; (name, M), each (N,)."""
    probabilities_NK = softmax(logits_NK.astype(np.float64) / temperature, axis=1)
    label_N, row_N = probabilities_NK.argmax(axis=1), np.arange(len(logits_NK))
    found = {("1 - the model's probability", 0): 1 - probabilities_NK[row_N, label_N]}
    for num_members in MEMBERS:
        members_MNK = softmax(logits_MNK[:num_members].astype(np.float64) / temperature, axis=2)
        probability_MN = members_MNK[:, row_N, label_N]
        agreement_N = (members_MNK.argmax(axis=2) == label_N).mean(axis=0)
        found["standard deviation", num_members] = probability_MN.std(axis=0, ddof=1)
        found["1 - agreement", num_members] = 1 - agreement_N
        found["1 - mean probability", num_members] = 1 - probability_MN.mean(axis=0)
    return found


def report(folder: Path, dataset: DataSet, num_images: int) -> None:
    """Print both tables. Raises SdpipeError if there are no hits and errors to tell apart."""
    row_N = np.linspace(0, len(dataset.test_labels_N) - 1, num_images).astype(int)
    labels_N = np.asarray(dataset.test_labels_N)[row_N]
    logits_NK, logits_MNK, temperature = collect(folder, np.asarray(dataset.test_images_NHWC)[row_N])
    wrong_N = logits_NK.argmax(axis=1) != labels_N
    if wrong_N.all() or not wrong_N.any():
        raise SdpipeError(
            f"{folder}: {wrong_N.sum()} of {num_images} images are wrong: nothing to tell apart"
        )
    found = scores(logits_NK, logits_MNK, temperature)
    plain_N = found["1 - the model's probability", 0]
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, num_images, num_images) for _ in range(RESAMPLES)]
    drawn = [some for some in drawn if wrong_N[some].any() and not wrong_N[some].all()]  # else no curve
    plain = [roc_auc_score(wrong_N[some], plain_N[some]) for some in drawn]
    print(f"n = {num_images}, {wrong_N.sum()} of them wrong, T = {temperature:.3f}\n")
    print("| score | M | AUROC | minus the plain one (95 %) | mean where wrong | where right |")
    print("|---|---|---|---|---|---|")
    for (name, members), score_N in found.items():
        gains = [
            roc_auc_score(wrong_N[some], score_N[some]) - before
            for some, before in zip(drawn, plain, strict=True)
        ]
        low, high = np.percentile(gains, [2.5, 97.5])
        print(
            f"| {name} | {members or ''} | {roc_auc_score(wrong_N, score_N):.3f} | {low:+.3f} to {high:+.3f} "
            f"| {score_N[wrong_N].mean():.3f} | {score_N[~wrong_N].mean():.3f} |"
        )
    print("\n| network | T | error | negative log-likelihood |\n|---|---|---|---|")
    for temp in (1.0, temperature):
        means = {"test network": softmax(logits_NK.astype(np.float64) / temp, axis=1)}
        for members in MEMBERS:
            members_MNK = softmax(logits_MNK[:members].astype(np.float64) / temp, axis=2)
            means[f"mean of {members} members"] = members_MNK.mean(axis=0)
        for name, mean_NK in means.items():
            nll = -np.log(mean_NK[np.arange(num_images), labels_N]).mean()
            print(f"| {name} | {temp:.3f} | {(mean_NK.argmax(axis=1) != labels_N).mean():.4f} | {nll:.4f} |")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path), metavar="models/RUN")
@click.argument("num_images", type=click.IntRange(min=2), required=False, metavar="[IMAGES]")
def main(folder: Path, num_images: int | None) -> None:
    """Compare what could tell a network's errors from its hits, on the run's test part or IMAGES of it."""
    with errors_on_one_line():
        data_set = open_artifact(folder / "model.onnx", "cpu").metadata.data_set
        dataset = open_dataset(Path("data") / data_set)
        num_test = len(dataset.test_labels_N)
        if num_images is not None and num_images > num_test:
            raise SdpipeError(f"IMAGES: expected at most the {num_test} of the test part, got {num_images}")
        report(folder, dataset, num_images or num_test)


if __name__ == "__main__":
    main()
