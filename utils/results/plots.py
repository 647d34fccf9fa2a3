"""Curves: report.png of a run, and of the rounds of a rejection sampling."""

from pathlib import Path

from rlhf_args.methods import Method
from utils.results.log import read_lines


def draw_report(folder: Path, method: Method) -> None:
    train, held = read_lines(folder / "metrics.jsonl"), read_lines(folder / "eval.jsonl")
    if not train:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("loss", "loss"), *method.metrics, *method.curves, ("learning rate", "learning_rate")]
    seen = {key.removeprefix("eval_") for line in [*train, *held] for key, value in line.items() if value is not None}
    panels = [(title, key) for title, key in panels if key in seen]
    columns = min(len(panels), 5)
    rows = -(-len(panels) // columns)
    size = 4 * columns, 3.2 * rows
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, key) in zip(axes.flat, panels, strict=False):
        lines = [line for line in train if line.get(key) is not None]
        axis.plot([line["step"] for line in lines], [line[key] for line in lines], label="training")
        points = [line for line in held if line.get(f"eval_{key}") is not None]
        if points:
            axis.plot([p["step"] for p in points], [p[f"eval_{key}"] for p in points], "o-", label="held out")
            axis.legend()
        axis.set_title(title)
        axis.set_xlabel("step")
    figure.savefig(folder / "report.png", dpi=120)
    pyplot.close(figure)


def draw_rewards(folder: str | Path, found: dict, shown: list[tuple[float, int]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    curve = found["best_of_n"]
    left.plot([point["n"] for point in curve], [point["reward"] for point in curve], marker="o", label="reward")
    left.set_xlabel("n")
    left.set_title("reward of best-of-n")
    bound = left.twinx()
    bound.plot([p["n"] for p in curve], [p["kl_bound"] for p in curve], color="gray", linestyle="--")
    bound.set_ylabel("KL bound log n - (n - 1)/n, nats (dashed)")
    scores, lengths = [score for score, _ in shown], [length for _, length in shown]
    middle.hist(scores, bins=40)
    middle.set_title(f"score of {len(shown)} of {found['answers']} answers")
    right.scatter(lengths, scores, s=8, alpha=0.5)
    right.set_xlabel("answer tokens")
    r = found["score_length_correlation"]
    right.set_title("score and length" + ("" if r is None else f": correlation {r:+.2f}"))
    figure.savefig(Path(folder) / "report.png", dpi=120)
    pyplot.close(figure)
