"""The flags of rejection sampling, beside those of RewardArgs in common_args.py."""

from dataclasses import dataclass, field

from rlhf_args.judge_config import JudgeConfig


@dataclass
class RejectionConfig(JudgeConfig):
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Where all is kept. The same command again goes on where it was stopped. Required."},
    )
    stages: list[str] = field(
        default_factory=lambda: ["generate,score,select"],
        metadata={"help": "What to do: generate, score, select, or some of them; each finds what the others left."},
    )
    seed: int = field(default=42, metadata={"help": "Of the sampling: the same prompt is answered the same again."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a model."})

    # ── generate ─────────────────────────────────────────────────────────────────────────────────────────────────────
    engine: str = field(
        default="transformers",
        metadata={
            "help": "Who answers: transformers or vllm, with --model_name_or_path, or openai: a server that speaks "
            "OpenAI's API, at --api_base_url.",
            "choices": ["transformers", "vllm", "openai"],
        },
    )
    num_completions: int = field(default=8, metadata={"help": "Answers to a prompt, 1 or more."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling; 0 takes the likeliest token."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the likeliest tokens of so much probability."})
    top_k: int = field(default=0, metadata={"help": "Sample from so many of the likeliest tokens; 0: from all."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest answer, in tokens."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt, in tokens; unset: what the model holds beside an answer."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "A system message for every chat that has none; it is written into the data."}
    )
    reference_column: str | None = field(
        default=None, metadata={"help": "A column of the data whose answers join the candidates, such as chosen."}
    )
    generate_batch_size: int | None = field(
        default=None, metadata={"help": "Answers sampled at once, and kept at once; unset: 64, with vllm 1024."}
    )
    held_out_prompts: bool = field(
        default=False, metadata={"help": "Take the prompts that --eval_fraction holds out in place of the others."}
    )

    # ── the server of --engine openai, and of the judge unless --judge_base_url names another ────────────────────────
    api_base_url: str | None = field(
        default=None,
        metadata={"help": "The engine's server, like http://localhost:8000/v1. Also the judge's, if it has none."},
    )
    api_model: str | None = field(default=None, metadata={"help": "The engine's model, by the server's name for it."})
    api_key_variable: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "The environment variable that holds the key. Also the judge's, if it has none."},
    )

    # ── score ────────────────────────────────────────────────────────────────────────────────────────────────────────
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Of each of --reward_funcs, then of --reward_model_path, then of the judge."}
    )
    score_batch_size: int = field(default=16, metadata={"help": "Answers scored at once by the reward model."})

    # ── select ───────────────────────────────────────────────────────────────────────────────────────────────────────
    select: str = field(
        default="best",
        metadata={
            "help": "Of each prompt's answers: best; top_k, the --select_k best; threshold, those of --threshold or "
            "more; pairs, the best where it is --min_margin better than the worst.",
            "choices": ["best", "top_k", "threshold", "pairs"],
        },
    )
    select_k: int = field(default=2, metadata={"help": "How many --select top_k takes."})
    threshold: float | None = field(default=None, metadata={"help": "The least score for --select threshold."})
    min_margin: float = field(
        default=0.0, metadata={"help": "By how much chosen must outscore rejected in a pair; 0: by anything."}
    )
    keep_cut: bool = field(
        default=False, metadata={"help": "Also select answers that were cut at --max_new_tokens. They never ended."}
    )
    write: list[str] = field(
        default_factory=list,
        metadata={"help": "Which files: SFT, DPO, KTO, Reward, some or all; unset: SFT, with --select pairs DPO."},
    )
    chunk_size: int | None = field(
        default=None, metadata={"help": "Rows a file: a folder of such files in place of one file; unset: one file."}
    )

    # ── train on it ──────────────────────────────────────────────────────────────────────────────────────────────────
    then: str | None = field(
        default=None,
        metadata={"help": "Train the model on the result with this method of train_rlhf.py, whose flags then follow."},
    )
    rounds: int = field(
        default=1, metadata={"help": "How often to sample, score, select and train, each time from the new model."}
    )

    def judge_server(self) -> tuple[str, str | None, str]:
        flag = "judge_base_url" if self.judge_base_url else "api_base_url"
        return flag, getattr(self, flag), self.judge_key_variable or self.api_key_variable

    def __post_init__(self) -> None:
        self.stages = split_commas(self.stages)
        self.write = split_commas(self.write or (["DPO"] if self.select == "pairs" else ["SFT"]))


def split_commas(words: list[str]) -> list[str]:
    """["a,b", "c"] as ["a", "b", "c"]."""
    return [part for word in words for part in word.split(",") if part]
