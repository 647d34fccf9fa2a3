"""The longest row that a step can meet."""

from utils.checks import flags
from utils.models import shapes
from utils.models.load import load_tokenizer
from utils.runtime.errors import Refused

PROMPTED = 512  # tokens of a prompt that is made up


class Longest:
    """The longest row of the data, or one as long as the flags allow. `lengths`: tokens of its prompt and answer."""

    def __init__(self, common, config, method, name):
        from utils.data import cache, columns
        from utils.data.rows import load_rows
        from utils.data.template import fit_tokenizer

        path, limit = common.model_name_or_path, flags.length_limit(config, common.model_name_or_path)
        known = shapes.find_shape(path) is None
        self.tokenizer = (
            load_tokenizer(path, common.model_revision, config.trust_remote_code) if known else shapes.make_tokenizer()
        )
        packed = config.packing  # a pass is full then, whatever the rows are
        if common.train_data_path and known and not packed:
            rows = load_rows(common.train_data_path, None, method.columns, name, common.max_samples).train
            fit_tokenizer(self.tokenizer, chat=columns.is_chat(rows[0][1]))
            prepared = cache.prepare_rows(rows, self.tokenizer, method.columns, limit)
            where = "the longest of the data"
        else:
            fit_tokenizer(self.tokenizer, chat=False)
            prepared = self.make_up(method, limit or PROMPTED)
            where = "packed" if packed else "made up, as no data is given" if known else "made up"
        if not prepared.rows:
            raise Refused(["no row is left to plan with: every one is longer than --max_length. Raise it"])
        at = max(range(len(prepared.rows)), key=lambda at: max(prepared.sizes[at]))
        self.row, tokens = prepared.rows[at], max(prepared.sizes[at])
        prompt = min(count_prompt(self.row, self.tokenizer), tokens)
        completion, answer = tokens - prompt, config.max_completion_length
        if method.sample_reward or config.seq_kd:
            completion = answer
        elif config.lmbda:
            completion = max(answer, completion)
        self.lengths = prompt, completion
        self.said = f"{prompt} + {completion} tokens, {where}"

    def make_up(self, method, limit):
        """A row that is as long as `limit` allows; of prompts alone, no longer than PROMPTED."""
        from rlhf_args.methods import PROMPT
        from utils.data import prepare

        if method.columns == PROMPT:
            limit = min(limit, PROMPTED)
        per_word = len(self.tokenizer(" ".join(["a"] * 64))["input_ids"]) / 64
        for less in range(limit):  # what the template adds
            words = int((limit - less) / per_word)
            first = words if method.columns == PROMPT else words // 2
            prompt, answer = (" ".join(["a"] * count) for count in (first, words - first))
            values = {
                "prompt": f"{prompt} ",
                "chosen": answer,
                "rejected": answer,
                "completion": answer,
                "label": True,
            }
            values = {column: values[column] for column in ("prompt", *method.columns) if column in values}
            if "messages" in method.columns:
                values["completion"] = answer
            prepared = prepare.prepare_rows(
                [("made up", values | {"further": {}})], self.tokenizer, method.columns, limit
            )
            if prepared.rows and not prepared.cut:
                break
        return prepared

    def batch(self, rows):
        from utils.data.prepare import Prepared

        return Prepared(rows=[self.row] * rows)


def count_prompt(row, tokenizer):
    """Tokens of the prompt of a row that is ready for its trainer."""
    if "input_ids" in row:
        return len(row["input_ids"])
    if "prompt_ids" in row:
        return len(row["prompt_ids"])
    from utils.data.template import template

    prompt = row.get("prompt", "")
    text = prompt if isinstance(prompt, str) else template(tokenizer, prompt, add_generation_prompt=True)
    return len(tokenizer(text)["input_ids"]) if text else 0
