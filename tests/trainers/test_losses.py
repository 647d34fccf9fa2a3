"""Each method's loss against its paper's formula, on numbers that fit on one screen. Offline, a few seconds.

    python -m pytest tests/trainers/test_losses.py -q

The models here know one thing: which word follows which. POLICY and REFERENCE hold -log2 of those probabilities, so
an answer's log-probability is a sum of small whole numbers times -ln 2. The rows go the way of a user's rows
(utils/data/, then the config and trainer that rlhf_args/methods.py names); each test writes its
formula out with the numbers of the table under ROWS.
"""

import math

import pytest

from rlhf_args.methods import METHODS, load
from utils.data import prepare, template
from utils.data.rows import make_rows

# -log2 P(next | word), in bits; a line's probabilities sum to one, as 1/8 + 1/2 + 1/4 + 1/8. The line of </s> is never
# to be paid: </s> ends an answer, and here it pads too.
WORDS = ["q", "a", "b", "</s>"]
POLICY = {
    "q": [3, 1, 2, 3],
    "a": [3, 3, 1, 2],
    "b": [2, 3, 3, 1],
    "</s>": [1, 2, 3, 3],
}
REFERENCE = {
    "q": [1, 2, 3, 3],
    "a": [2, 2, 2, 2],
    "b": [3, 1, 3, 2],
    "</s>": [3, 3, 2, 1],
}

ROWS = [
    {"prompt": "b q ", "chosen": "a b", "rejected": "q"},
    {"prompt": "a b ", "chosen": "a", "rejected": "q b a"},
]
# Bits of an answer, from the prompt's last word to the </s> behind it (e):
#                              POLICY         REFERENCE      tokens
# row 1  chosen    q>a>b>e     1+1+1   = 3    2+2+2   = 6    3
#        rejected  q>q>e       3+3     = 6    1+3     = 4    2
#        prompt    b>q         2 (ORPO only)                 1
# row 2  chosen    b>a>e       3+2     = 5    1+2     = 3    2
#        rejected  b>q>b>a>e   2+2+3+2 = 9    3+3+1+2 = 9    4
#        prompt    a>b         1 (ORPO only)                 1

LN2 = math.log(2)
TOLERANCE = 1e-5  # the trainers compute in float32: 7 digits, of losses below 10


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ── the methods ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_dpo_is_the_log_sigmoid_of_the_difference_of_log_ratios(tmp_path):
    # arXiv 2305.18290, eq. 7: -log sigmoid(beta * ((log pi_c - log ref_c) - (log pi_r - log ref_r)))
    row_1 = -log_sigmoid(0.1 * ((-3 + 6) - (-6 + 4)) * LN2)  # beta * 5 bits
    row_2 = -log_sigmoid(0.1 * ((-5 + 3) - (-9 + 9)) * LN2)  # beta * -2 bits
    assert losses("DPO", ROWS, tmp_path, beta=0.1) == near((row_1 + row_2) / 2)


def test_cpo_is_the_log_sigmoid_of_the_difference_plus_the_likelihood_of_the_chosen(tmp_path):
    # arXiv 2401.08417: -log sigmoid(beta * (log pi_c - log pi_r)) + NLL(chosen); alpha, its weight, is TRL's own.
    # The paper's NLL is a sum an answer, (3 + 5) / 2 bits here; TRL's a mean over all chosen tokens of the batch.
    row_1 = -log_sigmoid(0.1 * (-3 + 6) * LN2)
    row_2 = -log_sigmoid(0.1 * (-5 + 9) * LN2)
    nll = (3 + 5) / (3 + 2) * LN2
    assert losses("CPO", ROWS, tmp_path, beta=0.1, cpo_alpha=1.0) == near((row_1 + row_2) / 2 + 1.0 * nll)


def test_simpo_is_the_log_sigmoid_of_the_difference_of_means_less_the_margin(tmp_path):
    # arXiv 2405.14734, eq. 6: -log sigmoid(beta * (log pi_c / |c| - log pi_r / |r|) - gamma), and no likelihood term
    row_1 = -log_sigmoid(2.0 * (-3 / 3 + 6 / 2) * LN2 - 0.5)
    row_2 = -log_sigmoid(2.0 * (-5 / 2 + 9 / 4) * LN2 - 0.5)
    assert load(METHODS["SimPO"].config).cpo_alpha == 0  # TRL's 1 would add CPO's
    assert losses("SimPO", ROWS, tmp_path, beta=2.0, simpo_gamma=0.5) == near((row_1 + row_2) / 2)


def test_simpo_tells_apart_two_answers_that_differ_in_length_only(tmp_path):
    # q>a>b>e and q>b>e both cost 3 bits: for a sum there is nothing to choose, sigmoid(0) = 1/2; per token the longer
    # one is likelier by 3/2 - 3/3 bits: -log sigmoid(2 * 1/2 * ln 2) = log(1 + 1/2)
    row = {"prompt": "b q ", "chosen": "a b", "rejected": "b"}
    assert losses("CPO", [row], tmp_path, beta=2.0, cpo_alpha=0.0) == near(math.log(2))
    assert losses("SimPO", [row], tmp_path, beta=2.0, simpo_gamma=0.0) == near(math.log(1.5))


def test_cposimpo_is_simpo_plus_half_the_likelihood_of_the_chosen(tmp_path):
    # github.com/fe1ixxu/CPO_SIMPO: SimPO + alpha * NLL(chosen), a mean over tokens as in CPO; alpha 0.5 is our default
    row_1 = -log_sigmoid(2.0 * (-3 / 3 + 6 / 2) * LN2 - 0.5)
    row_2 = -log_sigmoid(2.0 * (-5 / 2 + 9 / 4) * LN2 - 0.5)
    nll = (3 + 5) / (3 + 2) * LN2
    assert losses("CPOSimPO", ROWS, tmp_path, beta=2.0, simpo_gamma=0.5) == near((row_1 + row_2) / 2 + 0.5 * nll)


def test_orpo_is_the_likelihood_of_the_chosen_less_the_log_sigmoid_of_the_log_odds_ratio(tmp_path):
    # arXiv 2403.07691, eq. 4 and 7: NLL - lambda * log sigmoid(log(odds_c / odds_r)) with odds = p / (1 - p), where
    # log p is an answer's mean per token: p = 2^-3/3 against 2^-6/2 in row 1, 2^-5/2 against 2^-9/4 in row 2
    row_1 = log_sigmoid(math.log(7))  # odds (1/2) / (1/2) = 1 against (1/8) / (7/8) = 1/7
    row_2 = log_sigmoid(math.log(2**-2.5 / (1 - 2**-2.5)) - math.log(2**-2.25 / (1 - 2**-2.25)))
    # TRL takes the NLL over prompt and answer, as the authors' code does (xfactlab/orpo, disable_prompt_loss off):
    # 2 more bits in row 1, 1 more in row 2
    nll = (2 + 3 + 1 + 5) / (1 + 3 + 1 + 2) * LN2
    assert losses("ORPO", ROWS, tmp_path, beta=0.1) == near(nll - 0.1 * (row_1 + row_2) / 2)


def test_kto_is_a_sigmoid_of_the_log_ratio_about_the_kl(tmp_path):
    # arXiv 2402.01306, eq. 7: 1 - sigmoid(beta * (ratio - KL)) for a thumb up, 1 - sigmoid(beta * (KL - ratio)) for a
    # thumb down. The KL is estimated: the mean ratio of a batch's prompts with one another's answers, 0 at least.
    rows = [
        {"prompt": "b q ", "completion": "q", "label": True},     # q>q>e:   4 - 6 = -2 bits
        {"prompt": "a b ", "completion": "a b", "label": False},  # b>a>b>e: (1+2+2) - (3+1+1) = 0
        {"prompt": "b q ", "completion": "a b", "label": True},   # q>a>b>e: 6 - 3 = 3
        {"prompt": "a b ", "completion": "q", "label": False},    # b>q>e:   (3+3) - (2+3) = 1
    ]  # fmt: skip
    kl_1 = (3 + 1) / 2  # row 1 with row 2's answer q>a>b>e: 3; row 2 with row 1's b>q>e: 1
    kl_2 = 0  # row 3 with row 4's answer q>q>e: -2; row 4 with row 3's b>a>b>e: 0; their mean is below 0
    batch_1 = (1 - sigmoid(0.1 * (-2 - kl_1) * LN2) + 1 - sigmoid(0.1 * (kl_1 - 0) * LN2)) / 2
    batch_2 = (1 - sigmoid(0.1 * (3 - kl_2) * LN2) + 1 - sigmoid(0.1 * (kl_2 - 1) * LN2)) / 2
    assert losses("KTO", rows, tmp_path, batch_size=2, beta=0.1) == near(batch_1, batch_2)


@pytest.mark.parametrize(
    ("pad", "differences"),
    [
        # transformers reads the score at the last token that is not pad: where </s> pads, at the last word
        pytest.param("</s>", (2 - -1, 0.5 - 2), id="pad-is-eos"),
        # else at the </s>, whose score is 7 whatever came before (a model of more than one word would know)
        pytest.param("<pad>", (7 - 7, 7 - 7), id="pad-is-not-eos"),
    ],
)
def test_reward_is_the_log_sigmoid_of_the_difference_of_scores(tmp_path, pad, differences):
    # Bradley-Terry, arXiv 2203.02155, eq. 1: -log sigmoid(score_c - score_r); q scores -1, a 0.5, b 2
    rows = [{"chosen": "b q a b", "rejected": "b q q"}, {"chosen": "a b a", "rejected": "a b q b"}]
    expected = -(log_sigmoid(differences[0]) + log_sigmoid(differences[1])) / 2
    assert losses("Reward", rows, tmp_path, pad=pad) == near(expected)


def test_sft_is_the_mean_cross_entropy_over_the_tokens_of_the_answers(tmp_path):
    # -log pi of 3 + 2 tokens, of all rows together; the prompts' 2 and 1 bits are not trained on
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    assert losses("SFT", rows, tmp_path) == near((3 + 5) / (3 + 2) * LN2)


# ── how the losses come about ────────────────────────────────────────────────────────────────────────────────────────


def near(*values):
    return pytest.approx(list(values), abs=TOLERANCE)


def losses(name, rows, folder, batch_size=None, pad="</s>", **flags):
    """The loss of every batch of `rows` (one batch, unless told), from the trainer that a user of `name` gets."""
    method, tokenizer = METHODS[name], make_tokenizer(pad)
    config = load(method.config)(
        output_dir=str(folder), per_device_train_batch_size=batch_size or len(rows), use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", disable_tqdm=True, **flags,
    )  # fmt: skip
    template.fit_tokenizer(tokenizer, chat=False)
    made, dropped = make_rows([(f"row {n}", row) for n, row in enumerate(rows, 1)], method.columns, [])
    prepared = prepare.prepare_rows(made, tokenizer, method.columns, config.max_length)
    assert not dropped and len(prepared.rows) == len(rows)
    trainer = load(method.trainer)(
        model=make_scorer(len(tokenizer)) if method.task == "SEQ_CLS" else make_bigram(POLICY),
        args=config,
        processing_class=tokenizer,
        train_dataset=prepare.as_dataset(prepared),
        **{model: make_bigram(REFERENCE) for model in method.models},
    )
    return [trainer.compute_loss(trainer.model, batch).item() for batch in trainer.get_train_dataloader()]


def make_tokenizer(pad):
    """A word is a token, and so is </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=None))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token=pad)


def make_config(size, **kwargs):
    """No layers: word embeddings one-hot, so that behind the final norm the word's own place holds sqrt(size)."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=0, num_attention_heads=1, head_dim=2,
        rms_norm_eps=0.0, tie_word_embeddings=False, bos_token_id=None, eos_token_id=WORDS.index("</s>"), **kwargs,
    )  # fmt: skip


def make_bigram(bits):
    """A language model with P(next | word) = 2^-bits[word][next], whatever came before."""
    import torch
    from transformers import LlamaForCausalLM

    size = len(WORDS)
    model = LlamaForCausalLM(make_config(size))
    log_probabilities = torch.tensor([bits[word] for word in WORDS]) * -LN2  # (word, next)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_((log_probabilities + 1.0).T / math.sqrt(size))  # + 1.0: softmax has to take it away
    return model


def make_scorer(size):
    """A reward model that scores a word by itself."""
    import torch
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(make_config(size, num_labels=1))
    scores = torch.tensor([-1.0, 0.5, 2.0, 7.0, -9.0])[:size]  # q, a, b, </s>, <pad>
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.score.weight.copy_(scores[None] / math.sqrt(size))
    return model
