"""Accuracy of a reward model on pairs: `python -m utils.score_reward_model MODEL DATA`.

DATA: pairs that the model was not trained on, in any form that --rlhf_type Reward reads. If the scores correlate with
the length of the answers, and "the longer answer wins" is as accurate, the model learned length.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_args.methods import RANKED
from utils.data import columns
from utils.data.files import Row
from utils.data.rows import Rows, count_reasons, hash_rows, load_rows
from utils.models.folders import ModelFolder
from utils.runtime import environment
from utils.runtime.errors import Refused
from utils.runtime.paths import check_writable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from utils.rewards.models import RewardModel

Pairs = list[tuple[float, float]]  # (of chosen, of rejected)
PAIRS = 32  # pairs scored per step of the progress bar


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="folder of a reward model or adapter, or Hub id")
    parser.add_argument("data", nargs="+", help="files, folders or Hub datasets of pairs, as for --rlhf_type Reward")
    parser.add_argument("--output_dir", help="default: output/score-NAME, with the name of the model's folder")
    asked = parser.parse_args(argv)
    environment.calm_libraries()
    folder = Path(asked.output_dir or Path("output") / f"score-{Path(asked.model).absolute().name}")
    try:
        rows, reward = load_scored(asked.model, asked.data, folder)
        scored = score_pairs(reward, rows.train)
    except Refused as refusal:
        Refused([with_scoring_flags(problem) for problem in refusal.problems]).say()
        return 2
    found = {"model": asked.model, "data": asked.data, "data_hash": hash_rows(rows.train)}
    found |= {"dropped_rows": count_reasons(rows.dropped)} | count_figures(**scored)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reward_model.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draw_scores(folder / "reward_model.png", found, **scored)
    for note in rows.notes:
        print(f"note      {note}")
    dropped = ", ".join(f"{count} {reason}" for reason, count in found["dropped_rows"].items()) or "none"
    cut = (
        f"; {found['cut_answers']} answers truncated at the front to the model's context"
        if found["cut_answers"]
        else ""
    )
    print(f"pairs     {found['pairs']}; refused: {dropped}{cut}")
    print(f"accuracy  {found['accuracy']:.3f}, ties counted half; mean margin {found['mean_margin']:.3g}")
    longer = f"{found['longer_wins_accuracy']:.3f}"
    print(f'length    {longer} is the accuracy of "the longer answer wins"; {say_r(found)}')
    print(f"result    {folder}: reward_model.json, reward_model.png")
    return 0


def load_scored(model: str, paths: list[str], folder: Path) -> tuple[Rows, "RewardModel"]:
    """(Rows of pairs, RewardModel), tried on a few pairs. Raises Refused."""
    from utils.rewards.models import check_reward_model, load_reward_model, try_reward_model

    problems = check_reward_model(model) + [*ModelFolder.at(model).check_weights()]
    problems += check_writable(folder)
    rows = load_rows(paths, None, RANKED, "Reward", problems=problems)
    # try_reward_model takes prompts, with the answers as further columns
    tried = [(where, {"prompt": pair["prompt"], "further": pair}) for where, pair in rows.train]
    dtype, device = ("bfloat16" if environment.has_bf16() else "float32"), "cuda" if environment.has_gpu() else "cpu"
    reward = load_reward_model(model, tried, dtype, device, batch_size=8)
    try_reward_model(reward, tried, dtype)
    return rows, reward


def with_scoring_flags(problem: str) -> str:
    """A problem of training, with this command's flag names."""
    return problem.replace("--reward_model_path", "MODEL").replace("--train_data_path", "DATA")


def score_pairs(reward: "RewardModel", rows: list[Row]) -> dict:
    """{scores: [(chosen, rejected)], lengths: in answer tokens, alike; cut: number of truncated answers}."""
    from tqdm import tqdm

    scores: Pairs = []
    lengths: Pairs = []
    before = reward.cut
    for start in tqdm(range(0, len(rows), PAIRS), desc="scoring", unit="batch", leave=False, disable=None):
        some = [pair for _, pair in rows[start : start + PAIRS]]
        answers = [(pair["prompt"], pair[side]) for pair in some for side in RANKED]
        found = reward.score([reward.tokens(prompt, answer) for prompt, answer in answers])
        texts = [tokens_of(reward.tokenizer, answer) for _, answer in answers]
        scores += zip(found[::2], found[1::2], strict=True)
        lengths += zip(map(len, texts[::2]), map(len, texts[1::2]), strict=True)
    return {"scores": scores, "lengths": lengths, "cut": reward.cut - before}


def tokens_of(tokenizer: "PreTrainedTokenizerBase", answer: str | list[dict]) -> list[int]:
    return tokenizer(columns.text_of(answer), add_special_tokens=False)["input_ids"]


def count_figures(scores: Pairs, lengths: Pairs, cut: int) -> dict:
    """The figures of reward_model.json; the correlation is None if scores or lengths are constant."""
    flat = [[value for pair in pairs for value in pair] for pairs in (lengths, scores)]
    varies = all(len(set(values)) > 1 for values in flat)
    return {
        "pairs": len(scores),
        "cut_answers": cut,
        "accuracy": accuracy(scores),
        "mean_margin": statistics.fmean(chosen - rejected for chosen, rejected in scores),
        "score_length_correlation": statistics.correlation(*flat) if varies else None,
        "longer_wins_accuracy": accuracy(lengths),
    }


def accuracy(pairs: Pairs) -> float:
    """Share of pairs in which the chosen answer has the higher value; a tie counts half."""
    return statistics.fmean((chosen > rejected) + (chosen == rejected) / 2 for chosen, rejected in pairs)


def say_r(found: dict) -> str:
    r = found["score_length_correlation"]
    return "no correlation (constant values)" if r is None else f"correlation of score and answer tokens {r:+.2f}"


def draw_scores(file: Path, found: dict, scores: Pairs, lengths: Pairs, cut: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.hist([chosen - rejected for chosen, rejected in scores], bins=40)
    left.axvline(0, color="black", linewidth=1)
    left.set_title(f"margin, chosen - rejected: accuracy {found['accuracy']:.3f}")
    for number, side in enumerate(RANKED):
        across, up = ([pair[number] for pair in pairs] for pairs in (lengths, scores))
        right.scatter(across, up, s=8, alpha=0.6, label=side)
    right.set_xlabel("answer tokens")
    right.set_title(f"score: {say_r(found)}")
    right.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
