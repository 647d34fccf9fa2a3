"""The flags of rejection sampling, in addition to RewardArgs in common_args.py."""

from dataclasses import dataclass

from rlhf_args.flag import flag
from rlhf_args.judge_config import JudgeConfig


@dataclass
class RejectionConfig(JudgeConfig):
    output_dir: str | None = flag(None, "Folder for answers, scores and files. The same command resumes it. Required.")
    stages: list[str] = flag(
        ["generate,score,select"],
        "Stages to run: generate, score, select. Each reads what earlier runs left in output_dir.",
    )
    seed: int = flag(42, "Seed of the sampling: the same prompt gets the same answers.")
    trust_remote_code: bool = flag(False, "Run code that comes with a model.")

    # ── generate ─────────────────────────────────────────────────────────────────────────────────────────────────────
    engine: str = flag(
        "transformers",
        "Engine that generates the answers. transformers or vllm: --model_name_or_path on this machine. openai: a "
        "server with OpenAI's API at --api_base_url.",
        choices=["transformers", "vllm", "openai"],
    )
    num_completions: int = flag(8, "Answers per prompt.", range="at least 1")
    temperature: float = flag(1.0, "Sampling temperature; 0: greedy decoding.", range="at least 0")
    top_p: float = flag(1.0, "Nucleus sampling; 1: all tokens.", range="above 0 and at most 1")
    top_k: int = flag(0, "Sample from the k most likely tokens; 0: from all.", range="at least 0")
    max_new_tokens: int = flag(512, "Maximum length of an answer, in tokens.", range="at least 1")
    max_prompt_length: int | None = flag(
        None,
        "Maximum length of a prompt, in tokens. Unset: the model's context less max_new_tokens.",
        range="at least 1, like 512",
    )
    system_prompt: str | None = flag(None, "System message for chats without one; also written to the output files.")
    reference_column: str | None = flag(None, "Data column with an extra candidate answer per prompt, like chosen.")
    generate_batch_size: int | None = flag(
        None, "Answers that are sampled, and saved, at once. Unset: 64, with vllm 1024.", range="at least 1, like 64"
    )
    held_out_prompts: bool = flag(False, "Sample for the prompts that --eval_fraction holds out, not for the others.")

    # ── the server of --engine openai, and of the judge unless --judge_base_url names another ────────────────────────
    api_base_url: str | None = flag(
        None, "Address of the engine's server, like http://localhost:8000/v1; also the judge's default."
    )
    api_model: str | None = flag(None, "Name of the engine's model on the server.")
    api_key_variable: str = flag("OPENAI_API_KEY", "Environment variable with the API key. The judge's default too.")

    # ── score ────────────────────────────────────────────────────────────────────────────────────────────────────────
    reward_weights: list[float] | None = flag(
        None, "One weight per reward: --reward_funcs first, then --reward_model_path, then the judge."
    )
    score_batch_size: int = flag(16, "Answers that the reward model scores at once.", range="at least 1")

    # ── select ───────────────────────────────────────────────────────────────────────────────────────────────────────
    select: str = flag(
        "best",
        "Which answers to a prompt are kept. best: the best one. top_k: the best --select_k. threshold: scores of at "
        "least --threshold. pairs: best and worst, if they differ by --min_margin.",
        choices=["best", "top_k", "threshold", "pairs"],
    )
    select_k: int = flag(2, "Answers per prompt with --select top_k.", range="at least 1")
    threshold: float | None = flag(None, "Minimum score with --select threshold.", range="finite, like 0.5")
    min_margin: float = flag(
        0.0,
        "Minimum difference between the scores of chosen and rejected; 0: any difference above 0.",
        range="at least 0",
    )
    keep_cut: bool = flag(False, "Also select answers truncated at --max_new_tokens.")
    write: list[str] = flag([], "Formats to write: SFT, DPO, KTO, Reward. Unset: SFT, or DPO with --select pairs.")
    chunk_size: int | None = flag(
        None,
        "Rows per file: writes a folder of files instead of one file. Unset: one file.",
        range="at least 1, like 10000",
    )

    # ── train on it ──────────────────────────────────────────────────────────────────────────────────────────────────
    then: str | None = flag(None, "Train on the selected data with this method of train_rlhf.py, and its flags.")
    rounds: int = flag(1, "Rounds of sampling and training, each from the last model.", range="at least 1")

    def judge_server(self) -> tuple[str, str | None, str]:
        name = "judge_base_url" if self.judge_base_url else "api_base_url"
        return name, getattr(self, name), self.judge_key_variable or self.api_key_variable

    def __post_init__(self) -> None:
        self.stages = split_commas(self.stages)
        self.write = split_commas(self.write or (["DPO"] if self.select == "pairs" else ["SFT"]))


def split_commas(words: list[str]) -> list[str]:
    """["a,b", "c"] as ["a", "b", "c"]."""
    return [part for word in words for part in word.split(",") if part]
