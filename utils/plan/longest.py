"""The longest row that a step can meet."""

from typing import TYPE_CHECKING

from rlhf_args.methods import PROMPT
from utils.checks import flags
from utils.cli.run import Run
from utils.models import shapes
from utils.models.load import load_tokenizer
from utils.runtime.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from utils.data.prepare import Prepared

PROMPTED = 512  # tokens of a made-up prompt, where no flag limits it


class Longest:
    """The longest row of the data, or a row as long as the flags allow. `lengths`: tokens of its prompt and answer."""

    def __init__(self, run: Run):
        from utils.data import cache, columns
        from utils.data.rows import load_rows
        from utils.data.template import fit_tokenizer

        common, config, method = run.common, run.config, run.method
        path, paths = common.model_name_or_path, common.train_data_path
        limit, has_folder = flags.length_limit(config, path), shapes.find_shape(path) is None
        source = path, common.model_revision, config.trust_remote_code
        self.tokenizer = load_tokenizer(*source) if has_folder else shapes.make_tokenizer()
        if paths and has_folder and not config.packing:  # packing fills every pass, however long the rows are
            rows = load_rows(paths, None, method.columns, run.name, common.max_samples).train
            fit_tokenizer(self.tokenizer, chat=columns.is_chat(rows[0][1]))
            prepared = cache.prepare_once(rows, self.tokenizer, method.columns, limit)
            where = "the longest row of the data"
        else:
            fit_tokenizer(self.tokenizer, chat=False)
            prepared = make_up(self.tokenizer, method.columns, limit or PROMPTED)
            where = "packed" if config.packing else "made up, as no data is given" if has_folder else "made up"
        if not prepared.rows:
            raise Refused(["no row to plan with: every row is longer than --max_length. Raise it"])
        sizes = list(map(max, prepared.sizes))
        tokens = max(sizes)
        self.row = prepared.rows[sizes.index(tokens)]
        prompt = min(count_prompt(self.row, self.tokenizer), tokens)
        completion = tokens - prompt
        if method.sample_reward or config.seq_kd:
            completion = config.max_completion_length
        elif config.lmbda:
            completion = max(config.max_completion_length, completion)
        self.lengths = prompt, completion
        self.said = f"{prompt} + {completion} tokens, {where}"

    def batch(self, rows: int) -> "Prepared":
        """The row, repeated."""
        from utils.data.prepare import Prepared

        return Prepared(rows=[self.row] * rows)


def make_up(tokenizer: "PreTrainedTokenizerBase", columns: tuple[str, ...], limit: int) -> "Prepared":
    """A row of `limit` tokens with the template; a method that takes prompts alone gets at most PROMPTED."""
    from utils.data import prepare

    alone = columns == PROMPT
    limit = min(limit, PROMPTED) if alone else limit
    per_word = len(tokenizer(" ".join(["a"] * 64))["input_ids"]) / 64
    for template in range(limit):  # tokens that the template adds
        words = int((limit - template) / per_word)
        first = words if alone else words // 2
        prompt, answer = (" ".join(["a"] * length) for length in (first, words - first))
        values = {"prompt": f"{prompt} ", "label": True} | dict.fromkeys(("chosen", "rejected", "completion"), answer)
        wanted = {"prompt", *columns, *(["completion"] if "messages" in columns else [])}
        values = {column: value for column, value in values.items() if column in wanted} | {"further": {}}
        prepared = prepare.prepare_rows([("made up", values)], tokenizer, columns, limit)
        if prepared.rows and not prepared.cut:
            break
    return prepared


def count_prompt(row: dict, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Prompt tokens of a prepared row."""
    from utils.data.template import template

    if ids := row.get("input_ids") or row.get("prompt_ids"):
        return len(ids)
    prompt = row.get("prompt", "")
    text = prompt if isinstance(prompt, str) else template(tokenizer, prompt, add_generation_prompt=True)
    return len(tokenizer(text)["input_ids"]) if text else 0
