"""The flags of an LLM judge and of its server, for rejection sampling and the online methods."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_args.flag import flag


@dataclass
class JudgeConfig:
    """Mixin. Without judge_model there is no judge."""

    if TYPE_CHECKING:

        @property
        def seed(self) -> int: ...  # a field of every class that mixes this in

    judge_model: str | None = flag(
        None,
        "Name of the language model, on its server, that judges the answers. Its score is added to those of "
        "--reward_funcs and --reward_model_path.",
    )
    judge_base_url: str | None = flag(
        None, "Address of the judge's server (OpenAI API), like http://localhost:8000/v1."
    )
    judge_key_variable: str | None = flag(None, "Environment variable with the judge's key. Unset: OPENAI_API_KEY.")
    # One request per answer, and a number that compares answers to different prompts.
    judge_mode: str = flag(
        "score",
        "score: rate each answer. pick: choose the best answer to a prompt, twice: in random order and in reverse; an "
        "answer's score is the fraction of the two passes that it wins.",
        choices=["score", "pick"],
    )
    judge_template: str | None = flag(
        None,
        "Text file of the judge's prompt, with {prompt} and {completion} (score) or {completions} (pick). It must ask "
        "for a verdict in double brackets: [[7]], [[B]]. A rubric starts with its criteria, as in "
        "data/judge_rubric.txt. Unset: data/judge_score.txt or data/judge_pick.txt.",
    )
    # The scale that judge models know best.
    judge_scale: list[float] = flag(
        [1.0, 10.0],
        "Lowest and highest score of --judge_mode score; a score outside is not a verdict.",
        range="finite, like 1 10",
    )
    # Enough for a few sentences before the verdict; a judge that reasons first needs more.
    judge_max_tokens: int = flag(512, "Maximum length of the judge's reply, in tokens.", range="at least 1")
    # A small server handles this many at once.
    api_concurrency: int = flag(8, "Concurrent requests to a server, per process.", range="at least 1")
    # A long reply of a large model takes a minute.
    api_timeout: float = flag(120.0, "Seconds to wait for a reply.", range="above 0")
    # Seven seconds of waiting in total, in which a busy server mostly recovers; a later run asks for the rest.
    api_retries: int = flag(
        4, "Retries of a failed request, after 0.5, 1, 2, ... 8 seconds, or as Retry-After says.", range="at least 0"
    )
    # Servers fail occasionally; a template that does not work fails nearly always.
    max_failed_fraction: float = flag(
        0.1,
        "Exit with status 1 if a larger fraction fails: of answers and scores in rejection sampling, of the judge's "
        "verdicts in online training.",
        range="at least 0 and at most 1",
    )

    def judge_server(self) -> tuple[str, str | None, str]:
        """(flag of the judge's address, that address, environment variable of its key)."""
        return "judge_base_url", self.judge_base_url, self.judge_key_variable or "OPENAI_API_KEY"
