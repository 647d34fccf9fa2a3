"""The engines that answer prompts: transformers, vLLM, or a server with OpenAI's API."""

from collections.abc import Callable
from typing import Any

from common_args import CommonArgs
from rlhf_args.rejection_config import RejectionConfig
from utils.data import template
from utils.models import load, sampling
from utils.rejection.folder import Line
from utils.rewards.server import GivenUp, Prompt
from utils.runtime import environment
from utils.runtime.output import say

Asked = tuple[Prompt, int]  # prompt, seed


class Engine:
    """batch: default number of answers at once."""

    batch: int

    def __init__(self, common: CommonArgs, config: RejectionConfig, tokenizer: Any) -> None:
        raise NotImplementedError

    def complete(self, requests: list[Asked]) -> list[Line]:
        """{"completion": text, "tokens": count, "ended": False if cut} or {"failed": reason} for each request."""
        raise NotImplementedError

    def say_failures(self) -> None:
        """Report the failed requests to a server."""


class Transformers(Engine):
    """The model on this process's device. An answer does not depend on the other answers in its batch."""

    batch = 64

    def __init__(self, common: CommonArgs, config: RejectionConfig, tokenizer: Any) -> None:
        import torch

        self.tokenizer = tokenizer
        self.drawn = sampling.Sampling(
            config.max_new_tokens, config.temperature, config.top_p, config.top_k, config.seed
        )
        self.model = load.load_model(
            common.model_name_or_path,
            task="CAUSAL_LM",
            dtype=common.dtype,
            tokenizer=tokenizer,
            seed=config.seed,
            revision=common.model_revision,
            attn_implementation=common.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            adapter="merge",
        )
        self.model = self.model.to(environment.local_device()).eval().requires_grad_(False)
        self.out_of_memory = torch.OutOfMemoryError

    def complete(self, requests: list[Asked]) -> list[Line]:
        prompts, seeds = (
            [template.prompt_ids(self.tokenizer, prompt) for prompt, _ in requests],
            [seed for _, seed in requests],
        )
        answers, start = [], 0
        size = len(requests) if self.fits is None else self.fits
        while start < len(requests):
            part = slice(start, start + size)
            try:
                answers += sampling.sample(self.model, self.tokenizer, prompts[part], self.drawn, seeds[part])
                start += size
            except self.out_of_memory:
                if size == 1:
                    raise
                size = self.fits = (size + 1) // 2
                say(f"\nnote      out of memory: {size} answers at once from now on (--generate_batch_size)")
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends)
        return [self.to_answer(ids, bool(ids) and ids[-1] in ends) for ids in answers]

    fits: int | None = None  # answers at once after an out-of-memory error

    def to_answer(self, ids: list[int], ended: bool) -> Line:
        return {
            "completion": self.tokenizer.decode(ids, skip_special_tokens=True).strip(),
            "tokens": len(ids),
            "ended": ended,
        }


class Vllm(Engine):
    """The model through vLLM, in one process on one GPU."""

    batch = 1024

    def __init__(self, common: CommonArgs, config: RejectionConfig, tokenizer: Any) -> None:
        from vllm import LLM, SamplingParams

        self.tokenizer = tokenizer
        self.llm = LLM(
            model=common.model_name_or_path,
            revision=common.model_revision,
            dtype=common.dtype,
            seed=config.seed,
            trust_remote_code=config.trust_remote_code,
        )
        stop = [tokenizer.eos_token_id]
        self.params = lambda seed: SamplingParams(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_tokens=config.max_new_tokens,
            seed=seed % 2**31,
            stop_token_ids=stop,
        )

    def complete(self, requests: list[Asked]) -> list[Line]:
        prompts = [{"prompt_token_ids": template.prompt_ids(self.tokenizer, prompt)} for prompt, _ in requests]
        found = self.llm.generate(prompts, [self.params(seed) for _, seed in requests], use_tqdm=False)
        answers = [one.outputs[0] for one in found]
        return [
            {
                "completion": answer.text.strip(),
                "tokens": len(answer.token_ids),
                "ended": answer.finish_reason == "stop",
            }
            for answer in answers
        ]


class OpenAI(Engine):
    """The model of a server, which applies its own template."""

    batch = 64

    def __init__(self, common: CommonArgs, config: RejectionConfig, tokenizer: Any) -> None:
        from utils.rewards import client

        self.server = client.Server(
            config.api_base_url or "",
            config.api_model or "",
            config.api_key_variable,
            concurrency=config.api_concurrency,
            timeout=config.api_timeout,
            retries=config.api_retries,
        )
        self.drawn = {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_tokens": config.max_new_tokens,
        }

    def complete(self, requests: list[Asked]) -> list[Line]:
        def sampling_of(seed: int) -> Callable[[int], dict[str, Any]]:
            return lambda refused: self.drawn | {"seed": seed % 2**31}

        found = self.server.ask_all([(prompt, self.to_answer, sampling_of(seed)) for prompt, seed in requests])
        return [{"failed": str(one)} if isinstance(one, GivenUp) else one for one in found]

    def say_failures(self) -> None:
        self.server.say_failures()

    @staticmethod
    def to_answer(written: str, tokens: int | None, ended: bool) -> Line:
        return {"completion": written.strip(), "tokens": tokens, "ended": ended}


ENGINES: dict[str, type[Engine]] = {"transformers": Transformers, "vllm": Vllm, "openai": OpenAI}
