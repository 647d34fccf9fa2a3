"""The flags of an LLM judge and of its server, for rejection sampling and the online methods."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING


@dataclass
class JudgeConfig:
    """Mixin. Without judge_model there is no judge."""

    if TYPE_CHECKING:

        @property
        def seed(self) -> int: ...  # a field of every class that mixes this in

    judge_model: str | None = field(
        default=None,
        metadata={
            "help": "A language model that judges the answers, by its server's name for it. Its numbers join "
            "--reward_funcs and --reward_model_path."
        },
    )
    judge_base_url: str | None = field(
        default=None, metadata={"help": "The judge's server, like http://localhost:8000/v1 (OpenAI's API)."}
    )
    judge_key_variable: str | None = field(
        default=None,
        metadata={"help": "The environment variable that holds the judge's key; unset: OPENAI_API_KEY."},
    )
    # One request per answer, and a number that compares answers to different prompts.
    judge_mode: str = field(
        default="score",
        metadata={
            "help": "score: a number for each answer. pick: the best of a prompt's answers, shown in random order and "
            "once more in reverse; an answer scores the share of the two passes that it won.",
            "choices": ["score", "pick"],
        },
    )
    judge_template: str | None = field(
        default=None,
        metadata={
            "help": "A text file with {prompt} and {completion} (score) or {completions} (pick) in it; unset: "
            "data/judge_score.txt or data/judge_pick.txt. The judge ends with its verdict in double brackets: "
            "[[7]], [[B]]. A rubric begins with its criteria, as data/judge_rubric.txt does."
        },
    )
    # The scale that judge models know best.
    judge_scale: list[float] = field(
        default_factory=lambda: [1.0, 10.0],
        metadata={"help": "The lowest and the highest number of --judge_mode score; a number outside is no verdict."},
    )
    # Room for a few sentences before the verdict; a judge that thinks first needs more.
    judge_max_tokens: int = field(default=512, metadata={"help": "Longest reply of the judge, in tokens."})
    # As many requests as a small server answers at once.
    api_concurrency: int = field(default=8, metadata={"help": "Requests to a server at once, in each process."})
    # A long reply of a large model takes a minute.
    api_timeout: float = field(default=120.0, metadata={"help": "Seconds to wait for one reply."})
    # Seven seconds of waiting in all: a busy server mostly answers by then, and a later run asks for the rest.
    api_retries: int = field(
        default=4,
        metadata={"help": "Retries of a failed request, after 0.5, 1, 2, ... 8 seconds, or what Retry-After says."},
    )
    # Servers fail now and then; a template that does not work fails nearly always.
    max_failed_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Exit status 1 where more than this share failed, 0 to 1: of answers and scores in rejection "
            "sampling, of the judge's verdicts in online training."
        },
    )

    def judge_server(self) -> tuple[str, str | None, str]:
        """(the flag that gives the address, the address or None, the environment variable of the key)."""
        return "judge_base_url", self.judge_base_url, self.judge_key_variable or "OPENAI_API_KEY"
